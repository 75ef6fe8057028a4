#!/usr/bin/env bash
# A real SLURM on this one machine, for tests: Debian's slurm-wlm and munge, without systemd.
#
#   sudo tools/slurm_here.sh          install, configure and start; does nothing that is done already
#   sudo tools/slurm_here.sh stop     end its daemons
#   sudo tools/slurm_here.sh status   whether it takes jobs
#
# One node with this machine's cores, overcommitted four times, one partition `here`. It writes
# /etc/slurm/slurm.conf, and refuses where another one stands there.
set -euo pipefail

MARK='# written by tools/slurm_here.sh'
CONF=/etc/slurm/slurm.conf
STATE=/var/lib/slurm-here
LOGS=/var/log/slurm-here
NODE=$(hostname -s)

say() { echo "slurm_here: $*"; }
fail() { echo "slurm_here: $*" >&2; exit 1; }

install_packages() {
  command -v sbatch > /dev/null && command -v slurmctld > /dev/null && command -v munged > /dev/null && return
  command -v apt-get > /dev/null || fail "no sbatch, and no apt-get to install slurm-wlm and munge with"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -q --no-install-recommends slurm-wlm munge > /dev/null 2>&1 || {
    apt-get update -q > /dev/null 2>&1 || true
    apt-get install -y -q --no-install-recommends slurm-wlm munge > /dev/null || fail "apt-get could not install slurm-wlm"
  }
  say "installed $(sbatch --version)"
}

# cred_expire is also how long a requeued job waits before it starts again (2 minutes by default).
configure() {
  [ ! -e "$CONF" ] || head -1 "$CONF" | grep -qxF "$MARK" || fail "$CONF is another SLURM's: leaving it alone"
  getent hosts "$NODE" > /dev/null || echo "127.0.0.1 $NODE" >> /etc/hosts
  local memory
  memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
  mkdir -p "$(dirname "$CONF")" "$STATE/ctld" "$STATE/d" "$LOGS"
  cat > "$CONF" << END
$MARK
ClusterName=here
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=30
MinJobAge=600
SlurmctldTimeout=300
SlurmdTimeout=300
SchedulerParameters=sched_interval=5,batch_sched_delay=1
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldPidFile=/run/slurm-here-ctld.pid
SlurmdPidFile=/run/slurm-here-d.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd.log
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=here Nodes=$NODE Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
}

start_munge() {
  munge -n < /dev/null > /dev/null 2>&1 && return
  if [ ! -s /etc/munge/munge.key ]; then
    (umask 077; dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none)
    chown munge:munge /etc/munge/munge.key
  fi
  install -d -o munge -g munge /run/munge /var/log/munge /var/lib/munge
  if command -v runuser > /dev/null; then runuser -u munge -- munged; else su munge -s /bin/sh -c munged; fi
}

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2> /dev/null; }

start() {
  [ "$(id -u)" = 0 ] || fail "must be root, as the daemons are"
  ready && { say "already takes jobs"; return; }
  install_packages
  configure
  start_munge
  running /run/slurm-here-ctld.pid || slurmctld -i
  running /run/slurm-here-d.pid || slurmd
  for _ in $(seq 60); do
    ready && { say "takes jobs on $NODE, $(nproc) cores ($(sbatch --version))"; return; }
    sleep 0.5
  done
  tail -5 "$LOGS/slurmctld.log" "$LOGS/slurmd.log" >&2
  fail "does not take jobs after 30 s; logs are in $LOGS"
}

ready() { command -v sinfo > /dev/null && sinfo -h -o %t 2> /dev/null | grep -qE '^(idle|mix|alloc)'; }

stop() {
  head -1 "$CONF" 2> /dev/null | grep -qxF "$MARK" || fail "there is nothing of ours to stop"
  for file in /run/slurm-here-d.pid /run/slurm-here-ctld.pid /run/munge/munged.pid; do
    running "$file" && kill "$(cat "$file")"
  done
  rm -f "$CONF"
  say "stopped"
}

case "${1:-start}" in
  start) start ;;
  stop) stop ;;
  status) if ready; then sinfo; else say "takes no jobs"; exit 1; fi ;;
  *) fail "unknown word '$1': start, stop or status" ;;
esac
