#!/usr/bin/env bash
# Stops what up.sh started, by the pid files it wrote: `make slurm-down`. WIPE=1 also removes its state and accounting.
set -u
BASE=${MEDDINO_SLURM:-/var/tmp/meddino-slurm}
export SLURM_CONF=$BASE/etc/slurm.conf

alive() { kill -0 "$1" 2>/dev/null && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null; }

stop() { # stop PIDFILE: asks, waits 20 s, then insists
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null
  for _ in $(seq 100); do
    alive "$pid" || break
    sleep 0.2
  done
  alive "$pid" && kill -9 "$pid"
  rm -f "$1"
}

if [ -e "$SLURM_CONF" ] && [ -e "$BASE/run/slurmctld.pid" ]; then
  timeout 10 scancel --state=PENDING --user="$(id -un)" 2>/dev/null
  timeout 10 scancel --state=RUNNING --user="$(id -un)" 2>/dev/null
  for _ in $(seq 50); do # the daemons kill their jobs only while they run
    [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
    sleep 0.2
  done
fi
for file in "$BASE"/run/slurmd-*.pid "$BASE/run/slurmctld.pid" "$BASE/run/slurmdbd.pid" "$BASE/run/mariadbd.pid" "$BASE/run/munged.pid"; do
  stop "$file"
done
[ "${WIPE:-0}" = 0 ] || rm -rf "$BASE"
exit 0
