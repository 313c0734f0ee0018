#!/usr/bin/env bash
# Run an S3 server on loopback, in the foreground until SIGTERM: a Ceph monitor, one OSD and the RADOS gateway.
#   ceph-rgw.sh DIR [PORT [ADDRESS]]       ADDRESS: where the gateway listens besides loopback
# DIR holds the data, the logs and s3.json, which has the keys and is written when the server is ready. The monitor
# listens on PORT + 1. Objects are in a sparse file and survive a restart.
set -euo pipefail

DIR=$(mkdir -p "${1:?usage: ceph-rgw.sh DIR [PORT]}" && cd "$1" && pwd)
PORT=${2:-27480}
ALSO=${3:-127.0.0.1}
packages="radosgw ceph-mon ceph-osd ceph-common"
for program in radosgw ceph-mon ceph-osd ceph ceph-authtool monmaptool radosgw-admin; do
  if ! command -v "$program" >/dev/null; then
    echo "$program is missing: apt-get install --no-install-recommends $packages" >&2
    exit 2
  fi
done

umask 077
mkdir -p "$DIR"/{mon,osd,log}
rm -f "$DIR/s3.json"
uuid() { cat /proc/sys/kernel/random/uuid; }
[ -s "$DIR/fsid" ] || uuid >"$DIR/fsid"
[ -s "$DIR/osd-uuid" ] || uuid >"$DIR/osd-uuid"
if [ ! -s "$DIR/bytes" ]; then # 80 % of what is free, in a sparse file
  free=$(df --output=avail -B1 "$DIR" | tail -n 1)
  echo $((free * 8 / 10)) >"$DIR/bytes"
fi
cat >"$DIR/ceph.conf" <<CONF
[global]
fsid = $(cat "$DIR/fsid")
mon host = v2:127.0.0.1:$((PORT + 1))
public addr = 127.0.0.1
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd memory target = 1073741824
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 1
keyring = $DIR/keyring
mon data = $DIR/mon
osd data = $DIR/osd
osd objectstore = bluestore
bluestore block size = $(cat "$DIR/bytes")
run dir = $DIR
pid file =
admin socket =
log file = $DIR/log/\$name.log
log to stderr = false
err to stderr = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$PORT$([ "$ALSO" = 127.0.0.1 ] || echo " endpoint=$ALSO:$PORT")
rgw thread pool size = 64
# Resharding is off, because its thread may read a setting while others are set, which ends the gateway. Small buckets
# do not need it.
rgw dynamic resharding = false
CONF
export CEPH_CONF="$DIR/ceph.conf"

pids=()
# shellcheck disable=SC2329  # by trap
finish() {
  trap - EXIT
  trap '' INT TERM
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do # gateway, OSD, monitor
    kill "${pids[i]}" 2>/dev/null || true
    # The gateway waits half a minute for clients with open connections. It has no state, so it can be killed.
    [ "$i" -lt 2 ] || (sleep 3 && kill -9 "${pids[i]}") 2>/dev/null &
    wait "${pids[i]}" 2>/dev/null || true
  done
  rm -f "$DIR/s3.json"
  exit "$1"
}
trap 'finish 0' INT TERM
trap 'finish 1' EXIT

fail() {
  echo "$1; read the logs in $DIR/log" >&2
  exit 1
}
wait_for() { # what, tries of 0.2 s, command...
  local what=$1 tries=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || fail "a Ceph daemon stopped while waiting for $what"; done
    ((tries -= 1)) || fail "$what did not start in time"
    sleep 0.2
  done
}
# shellcheck disable=SC2329  # by wait_for
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

cd "$DIR"
if [ ! -s keyring ]; then
  ceph-authtool --create-keyring keyring.new --gen-key -n mon. --cap mon 'allow *' >/dev/null
  for who in client.admin client.rgw; do
    ceph-authtool keyring.new --gen-key -n "$who" --cap mon 'allow *' --cap osd 'allow *' >/dev/null
  done
  ceph-authtool keyring.new --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
  mv keyring.new keyring
fi
monmaptool --create --clobber --addv a "[v2:127.0.0.1:$((PORT + 1))]" --fsid "$(cat fsid)" monmap >/dev/null
[ -s mon/keyring ] || ceph-mon --mkfs -i a --monmap monmap --keyring keyring
ceph-mon -i a --inject-monmap monmap # the port may have changed since the last start
ceph-mon -f -i a &
pids+=($!)
wait_for "the monitor" 150 timeout 5 ceph osd stat
if [ ! -s osd/ready ]; then
  ceph osd new "$(cat osd-uuid)" >/dev/null
  ceph auth import -i keyring 2>/dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$(cat osd-uuid)" 2>>log/mkfs.log || fail "cannot create the object store"
  date >osd/ready
fi
ceph-osd -f -i 0 &
pids+=($!)
radosgw -f -n client.rgw &
pids+=($!)
wait_for "the gateway" 600 answers "$PORT"
radosgw-admin user info --uid=crate-ray >s3.json.new 2>/dev/null ||
  radosgw-admin user create --uid=crate-ray --display-name=crate-ray >s3.json.new 2>>log/radosgw-admin.log
mv s3.json.new s3.json
echo "S3 endpoint http://127.0.0.1:$PORT, keys in $DIR/s3.json"
wait -n "${pids[@]}" || true
fail "a Ceph daemon stopped"
