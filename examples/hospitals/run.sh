#!/usr/bin/env bash
# Three hospitals with a table each and a coordinator, on one machine: from nothing to a report, an exported model and the
# audit. The page docs/howto/network.md explains the steps.
#
#   bash examples/hospitals/run.sh [FOLDER]
#
# PORT and the port after it must be free (default 8443). ROUNDS is the number of rounds (default 10).
set -euo pipefail
example=$(cd "$(dirname "$0")" && pwd)
folder=${1:-hospitals_demo}
port=${PORT:-8443}
rounds=${ROUNDS:-10}
hospitals="east north south"
mkdir -p "$folder"
cd "$folder"

# The hospitals' tables, and what all of them and the coordinator are given.
python "$example/prepare.py" .
for file in train.yaml federation.yaml; do
    sed -e "s/8444/$((port + 1))/; s/8443/$port/; s/^rounds: 10/rounds: $rounds/; s/max_epochs: 10/max_epochs: $rounds/" \
        "$example/$file" >"$file"
done

# Identities: each hospital's key is made by the hospital and stays there; only the request travels.
lightning-fl network ca init hospitals --name demo --host localhost
for name in $hospitals; do
    lightning-fl network request "$name" --out "$name"
    lightning-fl network approve hospitals "$name/request.csr"
    cp "hospitals/issued/$name/cert.pem" "hospitals/issued/$name/ca.pem" "$name/"
done

# The coordinator: no data, no model, no code of the hospitals.
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
lightning-fl coordinator --config train.yaml --federation federation.yaml >coordinator.log 2>&1 &
until grep -qs Serving coordinator.log; do
    kill -0 $! || { cat coordinator.log; exit 1; }
    sleep 0.2
done
lightning-fl network check "https://localhost:$port" --kit north

# The hospitals.
silos=()
for name in $hospitals; do
    lightning-fl fit --config train.yaml --trainer.strategy.init_args.kit "$name" \
        --data.init_args.path "$name.csv" --trainer.default_root_dir "runs/$name" >"$name.log" 2>&1 &
    silos+=($!)
done
for silo in "${silos[@]}"; do
    wait "$silo" || { tail -n 20 ./*.log; exit 1; }
done

# What is there afterwards.
lightning-fl network status --address "http://127.0.0.1:$((port + 1))" --once
lightning-fl report runs/north/lightning_logs/version_0 --out report.html
lightning-fl network export federation model.ckpt
lightning-fl export runs/north/lightning_logs/version_0 --shape 30 --to onnx --out model.onnx
lightning-fl network audit verify federation/audit.jsonl
lightning-fl network audit verify north/state/audit.jsonl
lightning-fl network audit show north/state/audit.jsonl
