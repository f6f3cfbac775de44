"""Text to token files: what `arriero prepare` does, as a function.

prepared = prepare(PrepareConfig(inputs=("a.jsonl",), out="data/a", tokenizer=Path("tokenizer")))
prepared.prefixes                     # ["data/a_text_document"]: what a recipe names as data.prefix
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arriero.common.errors import UserError
from arriero.common.text import escape_message
from arriero.data.indexed import bin_path, idx_path
from arriero.data.manifest import manifest_path, read_manifest
from arriero.data.output import writing_output
from arriero.data.prepare_config import PrepareConfig, PrepareJob, open_job
from arriero.data.tokenizer import Tokenizer
from arriero.data.writing import OnProgress, PreparedData, SourceHashes, sample_texts, write


def prepare(config: PrepareConfig) -> PreparedData:
    """Tokenises text into data sets, or finds that an earlier run did so from the same inputs with the same options.

    Raises:
        UserError: all problems of the options together; inputs that cannot be read; too many records that cannot be
            used; an output that exists and differs. Nothing is left of a set that was not finished.
    """
    return run_job(open_job(config))


def run_job(
    job: PrepareJob,
    *,
    on_engine: Callable[[str, str], None] = lambda engine, reason: None,
    on_progress: OnProgress = lambda fraction, documents, text_bytes, seconds: None,
) -> PreparedData:
    """Does the work of a job, see `prepare`.

    Args:
        job: what to do.
        on_engine: called before the work with the name of the tokenisation engine and why it was chosen.
        on_progress: called now and then with what is done.
    """
    config = job.config
    with writing_output(config.out):
        hashes = SourceHashes(job.files)
        if not config.overwrite:
            if (earlier := read_manifest(config.out)) is not None:
                _check_earlier(job, earlier, hashes.wait())
                return PreparedData(config.out, earlier, reused=True)
            _refuse_unmanaged(job)
        tokenizer, reason = _choose_engine(job)
        on_engine(tokenizer.engine, reason)
        return write(job, tokenizer, hashes, on_progress)


def _choose_engine(job: PrepareJob) -> tuple[Tokenizer, str]:
    """The tokenizer that does the work, and why it is this one. Raises UserError for --engine fast."""
    if job.config.engine == "reference":
        return job.tokenizer, ", as asked"
    from arriero.data.fast import choose_fast_tokenizer

    fast, reason = choose_fast_tokenizer(job.tokenizer, sample_texts(job))
    if fast is None and job.config.engine == "fast":
        raise UserError(f"--engine fast: {reason}", "pip install 'arriero[fast]', or use --engine auto")
    return fast or job.tokenizer, f": {escape_message(reason)}"


def _check_earlier(job: PrepareJob, earlier: dict[str, Any], hashes: list[str]) -> None:
    """Raises UserError unless the data sets of an earlier run are whole and are what this job would write."""
    out = job.config.out
    different = [key for key, value in job.request.items() if earlier["request"].get(key) != value]
    if [source["sha256"] for source in earlier["sources"]] != hashes:
        different.append("input files")
    if different:
        fix = "give --overwrite to replace it, or another --out"
        raise UserError(f"{out} was prepared from something else; different: {', '.join(different)}", fix)
    for name, entry in earlier["outputs"].items():
        path = bin_path(f"{out}_{name}")
        if not (path.is_file() and path.stat().st_size == entry["bin_bytes"] and idx_path(f"{out}_{name}").is_file()):
            problem = f"{path} is missing or cut short, though {manifest_path(out)} lists it"
            raise UserError(problem, "give --overwrite to write it anew")


def _refuse_unmanaged(job: PrepareJob) -> None:
    """Raises UserError if there are data sets of these names that no manifest describes."""
    for name in job.format.outputs:
        for path in (idx_path(f"{job.config.out}_{name}"), bin_path(f"{job.config.out}_{name}")):
            if path.exists():
                problem = f"{path} exists and has no manifest: another program wrote it"
                raise UserError(problem, "give --overwrite, or another --out")
