#!/usr/bin/env bash
# A whole cluster on this machine, on loopback only: two Ray nodes with token authentication, an S3 server (Ceph RADOS
# gateway), PostgreSQL and an MLflow server.
#   cluster/local.sh up        start everything, then print how to submit jobs
#   cluster/local.sh status    list the parts; exit status 0 if all of them run, else 3
#   cluster/local.sh down      end exactly the processes that `up` started; the data stays
#   cluster/local.sh cut       with CRATE_RAY_NAMESPACES=1: take down the network of the second Ray node
#   cluster/local.sh heal      bring it up again; if the node has ended meanwhile, start it again
# CRATE_RAY_CLUSTER_DIR holds all state (keys, logs, data). Remove it to start afresh. Settings: cluster/README.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "$(id -u)" = 0 ]; then # PostgreSQL then runs as user postgres, who cannot enter /root
  DEFAULT_DIR=/var/lib/crate-ray/cluster
else
  DEFAULT_DIR=$HOME/.cache/crate-ray/cluster
fi
STATE=${CRATE_RAY_CLUSTER_DIR:-$DEFAULT_DIR}
GCS_PORT=${CRATE_RAY_GCS_PORT:-26379}
DASHBOARD_PORT=${CRATE_RAY_DASHBOARD_PORT:-28265}
CLIENT_PORT=${CRATE_RAY_CLIENT_PORT:-28266}
S3_PORT=${CRATE_RAY_S3_PORT:-27480} # and the next one, for Ceph's monitor
POSTGRES_PORT=${CRATE_RAY_POSTGRES_PORT:-25432}
MLFLOW_PORT=${CRATE_RAY_MLFLOW_PORT:-25000}
half=$(($(nproc) / 2))
CPUS=${CRATE_RAY_CPUS_PER_NODE:-$((half > 0 ? half : 1))}
HEAD_IP=127.0.0.2 # not 127.0.0.1, which `ray start` replaces by the machine's external address
SECOND_IP=127.0.0.3
SERVICES_IP=127.0.0.1
NAMESPACES=${CRATE_RAY_NAMESPACES:-}
WITHIN=() # what starts a command in the second node's network
PARTS="s3 postgres mlflow ray-head ray-second"

say() { echo "$*"; }
die() {
  echo "local.sh: $*" >&2
  exit 1
}

# --- Our processes ------------------------------------------------------------------------------------------------------

start() { # name, command...: in a new session, marked by a variable that its children inherit
  local name=$1
  shift
  : >"$STATE/logs/$name.log"
  CRATE_RAY_CLUSTER_ID=$(cat "$STATE/id") setsid "$@" >>"$STATE/logs/$name.log" 2>&1 </dev/null 9>&- &
  echo "$name $!" >>"$STATE/pids"
}
is_marked() { grep -zqxF "CRATE_RAY_CLUSTER_ID=$(cat "$STATE/id")" "/proc/$1/environ" 2>/dev/null; }
pid_of() { [ -f "$STATE/pids" ] && awk -v name="$1" '$1 == name {pid = $2} END {print pid}' "$STATE/pids"; }
is_up() {
  local pid
  pid=$(pid_of "$1") && [ -n "$pid" ] && is_marked "$pid"
}
ours() { # pids of everything that `up` started, with descendants: a process title may have overwritten the mark
  [ -s "$STATE/id" ] || return 0
  { grep -lzxF "CRATE_RAY_CLUSTER_ID=$(cat "$STATE/id")" /proc/[0-9]*/environ 2>/dev/null || true; } |
    cut -d/ -f3 >"$STATE/marked"
  cat /proc/[0-9]*/stat 2>/dev/null |
    sed -E 's/^([0-9]+) \(.*\) (.) ([0-9]+) .*/\1 \2 \3/' |
    awk -v marked="$STATE/marked" -v self=$$ '
      BEGIN { while ((getline pid < marked) > 0) mine[pid] = 1 }
      { state[$1] = $2; parent[$1] = $3 }
      END {
        for (pid in parent) {
          for (up = pid; up > 1 && !(up in mine); up = parent[up]) {}
          if (up > 1 && pid != self && state[pid] != "Z") print pid
        }
      }'
}
gone_within() { # tenths of a second, pids...
  local tries=$1 pid left
  shift
  while :; do
    left=""
    for pid in "$@"; do
      [ -d "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2>/dev/null && left+=" $pid"
    done
    [ -z "$left" ] && return 0
    ((tries--)) || return 1
    sleep 0.1
  done
}

stop_all() {
  local name pid all node logs
  mapfile -t all < <(ours)
  for name in ray-second ray-head mlflow postgres s3; do
    is_up "$name" || continue
    pid=$(pid_of "$name")
    if [ "$name" = postgres ]; then # "fast" shutdown
      pid=$(head -n 1 "$STATE/postgres/postmaster.pid" 2>/dev/null || echo "$pid")
      kill -INT "$pid" 2>/dev/null || true
    elif [ "$name" = mlflow ]; then # signal its children too, or it waits 20 s
      kill -TERM -- "-$pid" 2>/dev/null || true
    else
      kill -TERM "$pid" 2>/dev/null || true
    fi
    gone_within 200 "$pid" || true
  done
  mapfile -O "${#all[@]}" -t all < <(ours)
  if [ "${#all[@]}" -gt 0 ] && ! gone_within 30 "${all[@]}"; then
    for signal in TERM KILL; do
      for pid in "${all[@]}"; do
        { is_marked "$pid" || [ -e "/proc/$pid" ]; } && kill "-$signal" "$pid" 2>/dev/null || true
      done
      gone_within 50 "${all[@]}" && break
    done
  fi
  if [ -s "$STATE/ray-tmp" ]; then
    local tmp
    tmp=$(cat "$STATE/ray-tmp")
    rm -rf "$STATE"/logs/ray-[12]*
    for node in "$tmp"/*; do
      for logs in "$node"/session_2*/logs; do [ -d "$logs" ] && cp -r "$logs" "$STATE/logs/ray-${node##*/}"; done
    done
    case $tmp in /tmp/crate-ray.*) rm -rf "$tmp" ;; esac
  fi
  remove_network
  rm -f "$STATE"/{pids,id,marked,ray-tmp}
}

# --- Network of the second node -------------------------------------------------------------------------------------------

# The second node is in a network namespace. A virtual cable leads from it to a bridge, on which the rest of the cluster
# listens. The bridge, the namespace and the interface in it have one name, so that gloo and NCCL find it on both nodes.
make_network() {
  local name third
  name=cr$(head -c 8 "$STATE/id")
  for third in {1..254}; do ip -4 -o address | grep -q " 10\.213\.$third\." || break; done
  echo "$name 10.213.$third" >"$STATE/network"
  ip netns add "$name"
  ip link add "$name" type bridge
  ip address add "10.213.$third.1/24" dev "$name"
  ip link set "$name" up
  ip link add "${name}-2" type veth peer name "$name" netns "$name"
  ip link set "${name}-2" master "$name" up
  ip -n "$name" address add "10.213.$third.2/24" dev "$name"
  ip -n "$name" link set lo up
  ip -n "$name" link set "$name" up
}
use_network() {
  local name prefix
  [ -s "$STATE/network" ] || return 0
  read -r name prefix <"$STATE/network"
  HEAD_IP=$prefix.1 SECOND_IP=$prefix.2 SERVICES_IP=$prefix.1
  WITHIN=(nsenter "--net=/run/netns/$name")
  export GLOO_SOCKET_IFNAME=$name NCCL_SOCKET_IFNAME=$name
}
remove_network() {
  local name
  [ -s "$STATE/network" ] || return 0
  read -r name _ <"$STATE/network"
  ip link delete "${name}-2" 2>/dev/null || true # both ends of the cable
  ip netns delete "$name" 2>/dev/null || true
  ip link delete "$name" 2>/dev/null || true
  rm "$STATE/network"
}
set_cable() { # up or down
  local name
  [ -s "$STATE/network" ] || die "the second node has no network of its own: start the cluster with CRATE_RAY_NAMESPACES=1"
  read -r name _ <"$STATE/network"
  ip link set "${name}-2" "$1"
}
cut_off() {
  set_cable down
  say "cut off: the second Ray node"
}
heal() {
  local until=$((SECONDS + 180)) steady=0
  set_cable up
  exec 9>"$STATE/lock"
  flock -n 9 || die "another local.sh works on $STATE"
  check_programs
  use_network
  # shellcheck disable=SC1091
  source "$STATE/env.sh"
  # A node that the head has given up ends by itself, a few seconds after it can reach the head again. Until then the
  # dashboard may still count it.
  while ((steady < 15)); do
    if ! is_up ray-second; then
      start_second
      steady=0
    elif ray_nodes_alive 2 2>/dev/null; then
      steady=$((steady + 1))
    else
      steady=0
    fi
    ((SECONDS < until)) || die "ray-second does not come back: read $STATE/logs/ray-second.log"
    sleep 1
  done
  say "healed: the second Ray node is back"
}

# --- up -----------------------------------------------------------------------------------------------------------------

check_programs() {
  local missing="" program
  for program in radosgw ceph-mon ceph-osd ceph-authtool; do
    command -v "$program" >/dev/null || missing="radosgw ceph-mon ceph-osd ceph-common"
  done
  POSTGRES_BIN=$(find /usr/lib/postgresql -path '*/bin/postgres' 2>/dev/null | sort -V | tail -n 1)
  if [ -n "$POSTGRES_BIN" ]; then
    POSTGRES_BIN=${POSTGRES_BIN%/postgres}
  elif command -v postgres >/dev/null && command -v initdb >/dev/null; then
    POSTGRES_BIN=$(dirname "$(readlink -f "$(command -v postgres)")")
  else
    missing+=" postgresql"
  fi
  [ -z "$missing" ] || die "Debian packages are missing: apt-get install --no-install-recommends ${missing# }"
  for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "$ROOT/.venv/bin/python" "$(command -v python || true)"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ] && [ -x "$(dirname "$candidate")/ray" ]; then
      BIN=$(dirname "$candidate")
      return
    fi
  done
  die "no Python environment with crate-ray: activate one, or make $ROOT/.venv (pip install -c constraints.txt -e .)"
}

check_ports() {
  "$BIN/python" - "$@" <<'PY' || exit 1
import socket, sys
for setting in sys.argv[1:]:
    name, host, port = setting.split("=")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, int(port)))
        except OSError as error:
            sys.exit(f"local.sh: port {port} is not free ({error.strerror}): set {name} to another port")
PY
}

wait_for() { # name of a part, seconds, command...
  local name=$1 until=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    is_up "$name" || die "$name stopped while starting: read $STATE/logs/$name.log"
    ((SECONDS < until)) || die "$name did not start in time: read $STATE/logs/$name.log"
    sleep 0.3
  done
}

as_postgres() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }

start_postgres() {
  local data=$STATE/postgres
  if [ ! -s "$data/PG_VERSION" ]; then
    rm -rf "$data"
    mkdir "$data"
    if [ "$(id -u)" = 0 ]; then
      chown postgres "$data"
      as_postgres test -w "$data" || die "user postgres cannot enter $STATE: set CRATE_RAY_CLUSTER_DIR to a folder it can"
    fi
    secret postgres-admin
    (umask 077 && cp "$STATE/secrets/postgres-admin" "$STATE/password")
    [ "$(id -u)" != 0 ] || chown postgres "$STATE/password"
    as_postgres "$POSTGRES_BIN/initdb" -D "$data" -U postgres -E UTF8 --locale=C.UTF-8 -A scram-sha-256 \
      --pwfile="$STATE/password" >"$STATE/logs/initdb.log" 2>&1 ||
      die "initdb failed: read $STATE/logs/initdb.log"
    rm "$STATE/password"
  fi
  local as=()
  [ "$(id -u)" != 0 ] || as=(runuser -u postgres --)
  start postgres "${as[@]}" "$POSTGRES_BIN/postgres" -D "$data" -p "$POSTGRES_PORT" \
    -c listen_addresses=127.0.0.1 -c unix_socket_directories=''
}

secret() { # name: a random password in secrets/NAME, made once
  [ -s "$STATE/secrets/$1" ] || head -c 24 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' >"$STATE/secrets/$1"
}

finish_postgres() { # make a role and a database for MLflow
  wait_for postgres 60 "$POSTGRES_BIN/pg_isready" -q -h 127.0.0.1 -p "$POSTGRES_PORT"
  secret mlflow
  (
    umask 077
    for role in postgres mlflow; do
      printf '127.0.0.1:%s:*:%s:' "$POSTGRES_PORT" "$role"
      cat "$STATE/secrets/$([ $role = postgres ] && echo postgres-admin || echo mlflow)"
      echo
    done >"$STATE/secrets/pgpass"
  )
  PGPASSFILE=$STATE/secrets/pgpass "$POSTGRES_BIN/psql" -qX -v ON_ERROR_STOP=1 -h 127.0.0.1 -p "$POSTGRES_PORT" \
    -U postgres -d postgres >>"$STATE/logs/postgres.log" 2>&1 <<SQL || die "PostgreSQL setup failed: read $STATE/logs/postgres.log"
SELECT 'CREATE ROLE mlflow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
ALTER ROLE mlflow PASSWORD '$(cat "$STATE/secrets/mlflow")';
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
SQL
}

write_env() { # env.sh, for the user's shell and for the Ray nodes
  "$BIN/python" - "$STATE" "$S3_PORT" "$DASHBOARD_PORT" "$MLFLOW_PORT" "$SERVICES_IP" <<'PY'
import json, pathlib, shlex, sys
state, s3_port, dashboard_port, mlflow_port, services = sys.argv[1:]
key = json.loads(pathlib.Path(state, "s3", "s3.json").read_text())["keys"][0]
env = {
    "RAY_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": f"{state}/secrets/ray-token",
    "AWS_ACCESS_KEY_ID": key["access_key"],
    "AWS_SECRET_ACCESS_KEY": key["secret_key"],
    "AWS_ENDPOINT_URL": f"http://{services}:{s3_port}",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "MLFLOW_TRACKING_URI": f"http://{services}:{mlflow_port}",
}
path = pathlib.Path(state, "env.sh")
path.touch(mode=0o600)
path.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items()))
PY
}

make_buckets() {
  "$BIN/python" - <<'PY' >>"$STATE/logs/buckets.log" 2>&1 || die "cannot make the buckets: read $STATE/logs/buckets.log"
import boto3
s3 = boto3.client("s3")
there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
for name in {"data", "runs", "mlflow"} - there:
    s3.create_bucket(Bucket=name)
PY
}

mlflow_answers() { get "http://$SERVICES_IP:$MLFLOW_PORT/health"; }
get() { "$BIN/python" -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())' "$1"; }
ray_nodes_alive() { # number
  "$BIN/python" - "$DASHBOARD_PORT" "$STATE/secrets/ray-token" "$1" <<'PY'
import json, pathlib, sys, urllib.request
port, token, wanted = sys.argv[1:]
request = urllib.request.Request(f"http://127.0.0.1:{port}/nodes?view=summary")
request.add_header("Authorization", "Bearer " + pathlib.Path(token).read_text().strip())
nodes = json.load(urllib.request.urlopen(request, timeout=5))["data"]["summary"]
alive = [node for node in nodes if node["raylet"].get("state") == "ALIVE"]
sys.exit(0 if len(alive) >= int(wanted) else 1)
PY
}

up() {
  if [ -n "$NAMESPACES" ]; then
    [ "$(id -u)" = 0 ] || die "CRATE_RAY_NAMESPACES needs root"
    command -v ip >/dev/null || die "CRATE_RAY_NAMESPACES needs a package: apt-get install --no-install-recommends iproute2"
  fi
  check_programs
  mkdir -p "$STATE"
  STATE=$(cd "$STATE" && pwd)
  umask 077
  chmod "$([ "$(id -u)" = 0 ] && echo 711 || echo 700)" "$STATE" # user postgres needs access to its data
  mkdir -p "$STATE"/{logs,secrets}
  exec 9>"$STATE/lock"
  flock -n 9 || die "another local.sh works on $STATE"
  if [ -f "$STATE/pids" ]; then
    local down=""
    for part in $PARTS; do is_up "$part" || down+=" $part"; done
    if [ -z "$down" ]; then
      use_network
      say "already up: $STATE"
      how_to
      return
    fi
    say "not running:$down; stopping the rest first"
    stop_all
  fi
  check_ports CRATE_RAY_GCS_PORT=$HEAD_IP="$GCS_PORT" CRATE_RAY_DASHBOARD_PORT=127.0.0.1="$DASHBOARD_PORT" \
    CRATE_RAY_CLIENT_PORT=$HEAD_IP="$CLIENT_PORT" CRATE_RAY_S3_PORT=127.0.0.1="$S3_PORT" \
    CRATE_RAY_S3_PORT=127.0.0.1=$((S3_PORT + 1)) CRATE_RAY_POSTGRES_PORT=127.0.0.1="$POSTGRES_PORT" \
    CRATE_RAY_MLFLOW_PORT=127.0.0.1="$MLFLOW_PORT"

  trap 'stop_all' EXIT # until everything is up
  trap 'exit 130' INT TERM HUP
  : >"$STATE/pids"
  tr -d - </proc/sys/kernel/random/uuid >"$STATE/id"
  [ -z "$NAMESPACES" ] || make_network
  use_network

  say "starting the S3 server and PostgreSQL"
  rm -f "$STATE/s3/s3.json"
  start s3 "$ROOT/cluster/ceph-rgw.sh" "$STATE/s3" "$S3_PORT" "$SERVICES_IP"
  start_postgres
  finish_postgres
  wait_for s3 150 test -s "$STATE/s3/s3.json"

  secret_token
  write_env
  # shellcheck disable=SC1091
  source "$STATE/env.sh"
  make_buckets

  say "starting MLflow and two Ray nodes with $CPUS CPUs each"
  (
    export PGPASSFILE=$STATE/secrets/pgpass MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
    unset MLFLOW_TRACKING_URI
    cd "$STATE"
    start mlflow "$BIN/mlflow" server --host "$SERVICES_IP" --port "$MLFLOW_PORT" --workers 1 \
      --backend-store-uri "postgresql+psycopg://mlflow@127.0.0.1:$POSTGRES_PORT/mlflow" \
      --serve-artifacts --artifacts-destination s3://mlflow/
  )
  local tmp
  # The path is short, because paths of sockets are limited. `down` copies its logs to $STATE/logs. Each node has its
  # own folder. In a common one, the second node would remove a job's working directory while the first node uses it.
  tmp=$(mktemp -d /tmp/crate-ray.XXXXXX)
  echo "$tmp" >"$STATE/ray-tmp"
  start_ray ray-head --head --node-ip-address "$HEAD_IP" --port "$GCS_PORT" --temp-dir "$tmp/1" \
    --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" --ray-client-server-port "$CLIENT_PORT"
  wait_for ray-head 120 ray_nodes_alive 1
  start_second
  wait_for ray-second 120 ray_nodes_alive 2
  wait_for mlflow 180 mlflow_answers
  trap - EXIT INT TERM HUP
  say "up: $STATE"
  how_to
}

secret_token() {
  if [ ! -s "$STATE/secrets/ray-token" ]; then # Ray makes it in ~/.ray, unless the environment names another token
    env -u RAY_AUTH_TOKEN -u RAY_AUTH_TOKEN_PATH HOME="$STATE/secrets" \
      "$BIN/ray" get-auth-token --generate >/dev/null 2>"$STATE/logs/token.log" ||
      die "no Ray token: read $STATE/logs/token.log"
    mv "$STATE/secrets/.ray/auth_token" "$STATE/secrets/ray-token"
    rmdir "$STATE/secrets/.ray"
    chmod 600 "$STATE/secrets/ray-token"
  fi
}

start_second() {
  start_ray ray-second --address "$HEAD_IP:$GCS_PORT" --node-ip-address "$SECOND_IP" \
    --temp-dir "$(mktemp -d "$(cat "$STATE/ray-tmp")/2.XXX")"
}

start_ray() { # name, options of `ray start`...
  local name=$1
  shift
  local within=()
  [ "$name" = ray-head ] || within=("${WITHIN[@]}")
  (
    unset RAY_ADDRESS # only the job CLI needs it
    export PATH="$BIN:$PATH" RAY_USAGE_STATS_ENABLED=0
    cd "$STATE"
    start "$name" "${within[@]}" "$BIN/ray" start --block --num-cpus "$CPUS" --object-store-memory "${CRATE_RAY_OBJECT_STORE_BYTES:-500000000}" \
      --dashboard-agent-listen-port 0 --disable-usage-stats "$@"
  )
}

how_to() {
  cat <<HOW

  source $STATE/env.sh
  python jobs/prepare.py --source digits --output s3://data/digits
  ray job submit --working-dir . -- python jobs/pretrain.py --config jobs/configs/digits.yaml \\
    --data.train s3://data/digits --data.validation null --storage s3://runs \\
    --tracking.uri "\$MLFLOW_TRACKING_URI" --scaling.workers 2

  dashboard  http://127.0.0.1:$DASHBOARD_PORT  (asks for the token in $STATE/secrets/ray-token)
  MLflow     http://$SERVICES_IP:$MLFLOW_PORT
  S3         http://$SERVICES_IP:$S3_PORT  (buckets data, runs, mlflow)
  logs       $STATE/logs;  stop: cluster/local.sh down
HOW
}

down() {
  if [ ! -s "$STATE/id" ]; then
    say "not up: $STATE"
    return
  fi
  exec 9>"$STATE/lock"
  flock -n 9 || die "another local.sh works on $STATE"
  stop_all
  say "down: $STATE keeps the data"
}

status() {
  local code=0
  for part in $PARTS; do
    if is_up "$part"; then say "$part: up, pid $(pid_of "$part")"; else
      say "$part: down"
      code=3
    fi
  done
  return $code
}

case ${1:-} in
  up | down | status | heal) "$1" ;;
  cut) cut_off ;; # a function named cut would be called instead of the program
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
