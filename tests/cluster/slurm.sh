#!/bin/sh
# A real Slurm on this machine (Debian's slurm-wlm and munge, one node): `experiments/accuracy.toml --quick` in 4 shards, one of
# them killed half-way and run again, equals the unsharded tables. Needs root. Usage: tests/cluster/slurm.sh [KVFUSE]
set -eu
kvfuse=$(realpath "${1:-target/release/kvfuse}")
here=$(realpath "$(dirname "$0")/../..")
work=$(mktemp -d)
trap 'pkill -x slurmctld; pkill -x slurmd; rm -rf "$work"' EXIT

command -v sbatch >/dev/null || { apt-get update -q >/dev/null; DEBIAN_FRONTEND=noninteractive apt-get install -qy slurm-wlm munge >/dev/null; }
[ -f /etc/munge/munge.key ] || mungekey -c
mkdir -p /run/munge /etc/slurm /var/lib/slurm/slurmctld /var/spool/slurmd
chown -R munge: /run/munge /etc/munge
pgrep -x munged >/dev/null || su -s /bin/sh munge -c munged
host=$(hostname -s)
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=kvfuse
SlurmctldHost=$host
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmUser=root
AuthType=auth/munge
ReturnToService=2
CONF
pgrep -x slurmctld >/dev/null || slurmctld
pgrep -x slurmd >/dev/null || slurmd
for i in $(seq 30); do sinfo -h -o %t | grep -q idle && break; sleep 1; done
sinfo

cd "$work"
ln -s "$here/data" data
cp -r "$here/experiments" .
"$kvfuse" -q run experiments/accuracy.toml --quick --root whole >/dev/null

"$kvfuse" plan experiments/accuracy.toml --shards 4 --format slurm -- --quick --root shared | sed "s|kvfuse run|$kvfuse run|" > job.sh
job=$(sbatch --parsable job.sh)
# The last shard dies as soon as it has begun.
for i in $(seq 600); do ls shared/quick/accuracy/*/shards/3-of-4/shard.json >/dev/null 2>&1 && break; sleep 0.2; done
scancel --signal=KILL "${job}_3" || true
while squeue -h -j "$job" 2>/dev/null | grep -q .; do sleep 1; done
for out in shared/quick/accuracy/*; do
    if "$kvfuse" merge "$out" 2> said; then
        echo "the killed shard had finished already"
    else
        cat said
        grep -q '3/4' said
    fi
done
again=$(sbatch --parsable --array=3 job.sh)
while squeue -h -j "$again" 2>/dev/null | grep -q .; do sleep 1; done
for out in shared/quick/accuracy/*; do
    "$kvfuse" merge "$out"
    for table in sweep.csv requests.csv layers.csv; do
        cmp "$out/$table" "whole/quick/accuracy/$(basename "$out")/$table"
    done
done
echo "sharded and unsharded tables are equal"
