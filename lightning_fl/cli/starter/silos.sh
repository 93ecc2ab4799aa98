#!/bin/sh
# Starts the four sites as four processes on this machine.
#
# On four machines every site runs the same command on its own, with the address of the first and its own number:
#   torchrun --nnodes 4 --nproc_per_node 1 --node_rank 0 --master_addr north.example.org --master_port 29500 \
#       -m lightning_fl fit --config silos.yaml
set -e
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc_per_node 4 -m lightning_fl fit --config silos.yaml "$@"
