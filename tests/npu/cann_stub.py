"""Builds libraries with which torch_npu loads without CANN: `python cann_stub.py DIRECTORY`, where it is installed.

The wheel asks for some 280 C functions of Huawei's libraries. Here each returns 0, and there is one device, which
computes nothing: names, shapes and dtypes can be checked on it, numbers cannot.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

SONAMES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
OURS = re.compile(r"\b(?:acl|rt[A-Z]|Msprof|Hccl)\w*$", re.M)  # all other unknown symbols are torch's and libc's
LATER = re.compile(rb"(?<=\x00)(?:aclrt|aclop|aclmdl|aclprof|aclsys|acl[A-Z]|rt[A-Z]|Hccl[A-Z])\w+(?=\x00)")

WITH_A_BODY = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *n) { *n = 1; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *n) { *n = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B2"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return ""; }',
    "aclrtGetMemInfo": "int aclrtGetMemInfo(int a, size_t *f, size_t *t) { *f = *t = (size_t)64 << 30; return 0; }",
    "aclrtMalloc": "int aclrtMalloc(void **p, size_t n, int o) { *p = malloc(n); return 0; }",
    "aclrtMallocAlign32": "int aclrtMallocAlign32(void **p, size_t n, int o) { *p = malloc(n); return 0; }",
    "aclrtMallocHost": "int aclrtMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }",
    "aclrtMemcpy": "int aclrtMemcpy(void *d, size_t m, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "aclGetCompileoptSize": "size_t aclGetCompileoptSize(int o) { return 8; }",
    "aclGetCompileopt": "int aclGetCompileopt(int o, char *s, size_t n) { memset(s, 0, n); return 0; }",
    **{
        name: f"int {name}(void **p) {{ *p = malloc(64); return 0; }}"
        for name in ("aclrtCreateStream", "aclrtCreateStreamWithConfig", "aclrtCreateEventExWithFlag",
                     "aclrtGetCurrentContext")
    },
}  # fmt: skip


def needed() -> list[str]:
    """The functions of CANN that the installed torch_npu asks for, when it is loaded or by name later."""
    spec = importlib.util.find_spec("torch_npu")
    assert spec is not None and spec.origin is not None, "torch_npu is not installed"  # noqa: PT018
    names: set[str] = set()
    for library in Path(spec.origin).parent.rglob("*.so"):
        listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        names |= set(OURS.findall(listing.stdout))
        names |= {word.decode() for word in LATER.findall(library.read_bytes())}
    return sorted(names)


def build(directory: Path) -> None:
    """Compiles one library and gives it all the names."""
    directory.mkdir(parents=True, exist_ok=True)
    functions = [WITH_A_BODY.get(name, f"int {name}() {{ return 0; }}") for name in needed()]
    source = directory / "cann.c"
    source.write_text("\n".join(["#include <stdlib.h>", "#include <string.h>", *functions, ""]), encoding="utf-8")
    first = directory / f"lib{SONAMES[0]}.so"
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", first, source], check=True)
    for name in SONAMES[1:]:
        link = directory / f"lib{name}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(first.name)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
