#!/usr/bin/env bash
# The first process of one machine of the cluster, in namespaces of its own: machine.sh FOLDER NAME
# When it is killed, all that runs on the machine is gone at once, as in a crash.
set -eu
live=$1/live name=$2
hostname "$name"
mount --bind "$live/hosts" /etc/hosts
mount --bind "$live/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777,size=1g shm /dev/shm
ip link set lo up
until ip link show eth0 >&/dev/null; do sleep 0.05; done # the cable comes from outside
ip address add "$(getent hosts "$name" | cut -d " " -f 1)/24" dev eth0
ip link set eth0 up
export SLURM_CONF=$live/slurm.conf
ulimit -c 0
cd "$live"

# A daemon that ends is started again, as systemd would: slurmd 22.05 aborts once in a while, and its steps outlive it.
keep() { while :; do "$@" || echo "$1 ended with $?"; sleep 0.5; done; }

if [[ $name == head ]]; then
  export TMPDIR=$live/run # MariaDB names its temporary files by process number, and two clusters have the same ones
  keep munged --foreground --key-file="$live/munge.key" --socket="$live/run/munge.sock" --pid-file="$live/run/munged.pid" \
    --seed-file="$live/munge.seed" &
  mariadb-install-db --no-defaults --user=root --datadir="$live/db" --skip-test-db \
    --auth-root-authentication-method=socket --auth-root-socket-user=root
  keep mariadbd --defaults-file="$live/my.cnf" &
  export MYSQL_UNIX_PORT=$live/run/mariadb.sock
  until mariadb --no-defaults -e 'select 1' >&/dev/null && [[ -S $live/run/munge.sock ]]; do sleep 0.1; done
  keep slurmdbd -D &
  until (: </dev/tcp/head/6819) 2>/dev/null; do sleep 0.1; done
  keep slurmctld -D
else
  keep slurmd -D -N "$name"
fi
