#!/usr/bin/env bash
# What the cluster tests need from Debian or Ubuntu: network namespaces and a real SLURM. Run as root, as the tests are.
set -euo pipefail
command -v ip >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null && exit 0
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iproute2 slurmd slurmctld slurm-client
