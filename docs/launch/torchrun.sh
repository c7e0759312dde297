#!/usr/bin/env bash
# Two nodes of eight GPUs by torchrun. Run the same command on both, the second with NODE=1:
#   HEAD=node0.cluster NODE=0 docs/launch/torchrun.sh loss=kto model=hf model.path=… data=json data.train=…
# With --max-restarts, a job whose process died is started again and goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
NODES=${NODES:-2} DEVICES=${DEVICES:-8} NODE=${NODE:-0} HEAD=${HEAD:-127.0.0.1} PORT=${PORT:-29500}
exec .venv/bin/python -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$DEVICES" --node-rank "$NODE" \
    --master-addr "$HEAD" --master-port "$PORT" --max-restarts "${RESTARTS:-3}" \
    scripts/train.py strategy=fsdp precision=bf16-mixed \
    trainer.num_nodes="$NODES" trainer.devices="$DEVICES" \
    output_dir="${OUTPUT:-out/run}" resume=auto "$@"
