#!/usr/bin/env bash
# Every training of the comparison beyond the checkpoints that come with the package: other seeds and
# budgets, and ETC's ablations on a shorter schedule. One after the other; the same call again continues
# where it stopped and skips what is done. With names, only those: train.sh etc-4 ablation-alpha-0
# Checkpoints and logs are put where plan.yaml looks for them; RUNS is where the trainings run.
set -eu

here="$(dirname "$0")"
runs="${RUNS:-runs/training}"
wanted=" $* "

train() { # name of the checkpoint, recipe, changes
    local name="$1" recipe="$2"
    shift 2
    [ "$wanted" = "  " ] || [[ "$wanted" = *" $name "* ]] || return 0
    local kept="$here/checkpoints/$name"
    [[ "$name" != ablation-* ]] || kept="$here/ablations/checkpoints/$name"
    [ ! -d "$kept" ] || return 0
    etcbench train --recipe "$recipe" --out "$runs/$name" --set "name=$name" --set storage=delta4 "$@"
    python -m etcbench.recipes.curves "$runs/$name" "$here/training" --name "$name"
    mkdir -p "$(dirname "$kept")"
    cp -r "$runs/$name/result" "$kept"
}

for seed in 1 2; do
    train "etc-1-seed$seed" micro-etc-1 --seed "$seed"
    train "voco-1-seed$seed" micro-voco-1 --seed "$seed"
done
for tokens in 4 16 2; do
    train "etc-$tokens" micro-etc-1 --tokens "$tokens"
    train "voco-$tokens" micro-voco-1 --tokens "$tokens"
done
for tokens in 4 16 2; do
    train "qwen3vl-etc-$tokens" micro-qwen3vl-etc-1 --tokens "$tokens"
    train "qwen3vl-voco-$tokens" micro-qwen3vl-voco-1 --tokens "$tokens"
done
for seed in 1 2; do
    train "qwen3vl-etc-1-seed$seed" micro-qwen3vl-etc-1 --seed "$seed"
    train "qwen3vl-voco-1-seed$seed" micro-qwen3vl-voco-1 --seed "$seed"
done
for tokens in 4 16; do
    train "quecc-$tokens" micro-quecc-1 --tokens "$tokens"
    train "qwen3vl-quecc-$tokens" micro-qwen3vl-quecc-1 --tokens "$tokens"
done
train qwen3vl-quecc-2 micro-qwen3vl-quecc-1 --tokens 2 # windows of micro-llava's 8 x 8 are square

short() { # name, changes; 300 steps of 8 scenes instead of 400 of 16
    local name="$1"
    shift
    train "ablation-$name" micro-etc-1 --set stages.0.steps=300 \
        --set stages.0.batch_size=8 "$@"
}

short base
short lambda-0 --set options.lambda_vid=0
short alpha-0 --set options.alpha=0
short lambda-3e-3 --set options.lambda_vid=3.0e-3
short mse --set options.auxiliary=mse
short layer-first --set options.layer=0
short alpha-1 --set options.alpha=1
short lambda-3e-5 --set options.lambda_vid=3.0e-5
short decoder-qformer --set options.decoder=qformer
short layer-middle --set options.layer=4
short decoder-outer-product --set options.decoder=outer_product
short lambda-1e-3 --set options.lambda_vid=1.0e-3
short decoder-linear --set options.decoder=linear_interpolation
short alpha-0.2 --set options.alpha=0.2
short lambda-1e-4 --set options.lambda_vid=1.0e-4

# A second seed of what the ablations are read for.
short base-seed1 --seed 1
short lambda-0-seed1 --seed 1 --set options.lambda_vid=0
short decoder-qformer-seed1 --seed 1 --set options.decoder=qformer
