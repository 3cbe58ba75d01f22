#!/usr/bin/env bash
# A real SLURM of two nodes on this one machine, for the tests: `make slurm-up`. Debian or Ubuntu, root, no systemd needed.
# Run again at any time: what is installed, configured or running already is left as it is.
#
#   NODES=2 CPUS=8 GPUS=2 ACCOUNTING=1 MEDDINO_SLURM=/var/tmp/meddino-slurm slurm/test_cluster/up.sh
#
# ACCOUNTING=0 leaves out slurmdbd and its database, as many sites do; sacct then answers nothing.
# Everything lies in $MEDDINO_SLURM: a SLURM of the machine's own in /etc/slurm is neither read nor changed. Commands
# find this one through SLURM_CONF=$MEDDINO_SLURM/etc/slurm.conf.
set -euo pipefail

BASE=${MEDDINO_SLURM:-/var/tmp/meddino-slurm}
NODES=${NODES:-2}
CPUS=${CPUS:-8}
GPUS=${GPUS:-2}
ACCOUNTING=${ACCOUNTING:-1}
CONTROLLER_PORT=26817
DATABASE_DAEMON_PORT=26819
DATABASE_PORT=26306
NODE_PORT=26820 # of node 1; node i listens on the (i-1)th after it
MACHINE=$(hostname -s)
SQL=(mariadb --no-defaults --socket="$BASE/run/sql.sock")
export SLURM_CONF=$BASE/etc/slurm.conf
export DEBIAN_FRONTEND=noninteractive

log() { printf 'slurm-up %3d s: %s\n' "$SECONDS" "$*"; }
die() { log "$*" >&2; exit 1; }

# runs NAME PIDFILE: is the process of that pid file alive, and still the program that wrote it?
runs() {
  local pid
  pid=$(cat "$2" 2>/dev/null) || return 1
  [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status"
}

# within SECONDS COMMAND...: tries until it succeeds.
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || die "gave up waiting for: $*; logs are in $BASE/log"
    sleep 0.2
  done
}

install_packages() {
  local wanted=(slurmctld slurmd slurm-client munge) absent=() package
  [ "$ACCOUNTING" = 1 ] && wanted+=(slurmdbd mariadb-server-core mariadb-client-core)
  for package in "${wanted[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || absent+=("$package")
  done
  [ ${#absent[@]} -eq 0 ] && return
  log "installing ${absent[*]}"
  # Debian's packages would start services of their own; policy-rc.d is how one asks them not to.
  local policy=/usr/sbin/policy-rc.d made=0
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; made=1; }
  { apt-get update -q && apt-get install -q -y --no-install-recommends "${absent[@]}"; } >"$BASE/log/apt.log" 2>&1 ||
    { tail -n 20 "$BASE/log/apt.log" >&2; die "apt-get could not install ${absent[*]}"; }
  [ $made = 1 ] && rm -f $policy
  return 0
}

start_munge() {
  munge -n 2>/dev/null | unmunge >/dev/null 2>&1 && return # one that runs already, whoever started it
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /var/lib/munge /var/log/munge
  if [ ! -s /etc/munge/munge.key ]; then
    install -o munge -g munge -m 400 /dev/null /etc/munge/munge.key
    head -c 1024 /dev/urandom >/etc/munge/munge.key
  fi
  setpriv --reuid munge --regid munge --clear-groups munged --force
  within 10 sh -c 'munge -n | unmunge'
  cp /run/munge/munged.pid "$BASE/run/munged.pid" # down.sh stops munge only if it was us
}

name_nodes() { # the first name of a node list becomes MASTER_ADDR, so it has to resolve
  local i
  for i in $(seq "$NODES"); do
    grep -qE "[[:space:]]n$i([[:space:]]|\$)" /etc/hosts || echo "127.0.0.1 n$i" >>/etc/hosts
  done
}

start_database() {
  [ -d "$BASE/sql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$BASE/sql" --skip-test-db \
    --auth-root-authentication-method=normal >"$BASE/log/sql-install.log" 2>&1
  if ! runs mariadbd "$BASE/run/mariadbd.pid"; then
    setsid mariadbd --no-defaults --user=root --datadir="$BASE/sql" --socket="$BASE/run/sql.sock" \
      --pid-file="$BASE/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$DATABASE_PORT --skip-name-resolve \
      --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
      >"$BASE/log/mariadbd.log" 2>&1 </dev/null &
    within 30 "${SQL[@]}" -e 'SELECT 1'
  fi
  "${SQL[@]}" -e "CREATE DATABASE IF NOT EXISTS meddino_jobs; CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON meddino_jobs.* TO 'slurm'@'127.0.0.1'"
  install -m 600 /dev/null "$BASE/etc/slurmdbd.conf" # slurmdbd refuses one that others can read
  cat >"$BASE/etc/slurmdbd.conf" <<END
AuthType=auth/munge
DbdHost=localhost
DbdPort=$DATABASE_DAEMON_PORT
SlurmUser=root
PidFile=$BASE/run/slurmdbd.pid
LogFile=$BASE/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DATABASE_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=meddino_jobs
END
  runs slurmdbd "$BASE/run/slurmdbd.pid" || slurmdbd
  within 20 bash -c "exec 3<>/dev/tcp/127.0.0.1/$DATABASE_DAEMON_PORT"
}

accounting_lines() {
  if [ "$ACCOUNTING" = 1 ]; then
    printf '%s\n' AccountingStorageType=accounting_storage/slurmdbd AccountingStorageHost=localhost \
      AccountingStoragePort=$DATABASE_DAEMON_PORT JobAcctGatherType=jobacct_gather/linux
  else
    printf '%s\n' AccountingStorageType=accounting_storage/none JobAcctGatherType=jobacct_gather/none
  fi
}

write_slurm_conf() {
  local i
  cat <<END
ClusterName=meddino
SlurmctldHost=$MACHINE(127.0.0.1)
SlurmctldPort=$CONTROLLER_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s by default.
AuthInfo=cred_expire=5
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool-%n
SlurmctldPidFile=$BASE/run/slurmctld.pid
SlurmdPidFile=$BASE/run/slurmd-%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd-%n.log
# No cgroups and no real hardware behind the CPUs, the memory and the GPUs that are claimed below.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
# A node is dead after 30 s without an answer; jobs get 5 s between SIGTERM and SIGKILL.
SlurmdTimeout=30
KillWait=5
ReturnToService=2
# Pre-emption first sends the job's own signal (--signal), and takes the nodes GraceTime later.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
END
  accounting_lines
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeHostname=$MACHINE NodeAddr=127.0.0.1 Port=$((NODE_PORT + i - 1)) CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN"
  done
  echo "PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP"
  echo "PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP"
}

write_config() { # prints "changed" if a running SLURM has to read it again
  local file i
  for i in $(seq 0 $((GPUS - 1))); do
    [ -c "$BASE/dev/gpu$i" ] || mknod "$BASE/dev/gpu$i" c 1 3 # a GPU without hardware is /dev/null by another name
  done
  write_slurm_conf >"$BASE/etc/slurm.conf.new"
  if [ "$GPUS" -gt 0 ]; then echo "Name=gpu File=$BASE/dev/gpu[0-$((GPUS - 1))] Flags=nvidia_gpu_env"; fi >"$BASE/etc/gres.conf.new"
  for file in slurm gres; do
    cmp -s "$BASE/etc/$file.conf.new" "$BASE/etc/$file.conf" || { cp "$BASE/etc/$file.conf.new" "$BASE/etc/$file.conf"; echo changed; }
    rm "$BASE/etc/$file.conf.new"
  done
}

all_nodes_answer() { [ "$(sinfo -h -N -p low -o '%N %t' | grep -cE ' (idle|mix|alloc)$')" = "$NODES" ]; }

start_slurm() {
  local changed=$1 i
  runs slurmctld "$BASE/run/slurmctld.pid" || slurmctld
  within 20 scontrol ping
  for i in $(seq "$NODES"); do
    mkdir -p "$BASE/spool-n$i"
    runs slurmd "$BASE/run/slurmd-n$i.pid" || slurmd -N "n$i"
  done
  [ -z "$changed" ] || scontrol reconfigure
  for i in $(sinfo -h -N -p low -t drain,down -o %N | sort -u); do
    scontrol update nodename="$i" state=resume 2>/dev/null || true # one that is down only because it was off comes back by itself
  done
  within 30 all_nodes_answer
  [ "$ACCOUNTING" = 0 ] || within 20 sacct -n
}

[ "$(id -u)" = 0 ] || die "needs root: it installs packages and starts munged, slurmctld and slurmd"
command -v apt-get >/dev/null || die "needs apt-get (Debian or Ubuntu)"
mkdir -p "$BASE"/{etc,run,log,state,dev}
install_packages
start_munge
name_nodes
[ "$ACCOUNTING" = 0 ] || start_database
start_slurm "$(write_config)"
log "$(sinfo -h -p low -o '%D nodes %t') ; export SLURM_CONF=$SLURM_CONF"
