#!/bin/sh
# Everything that benchmarks/results/<device>/ holds, by groups that may be run one at a time:
#
#   sh benchmarks/measure.sh OUT tests sanitize mlp model decode contexts batches timeline codes      needs a GPU
#   sh benchmarks/measure.sh OUT quality quantised finetune DATA                       also SmolLM2 and data (README.md says which)
#   sh benchmarks/measure.sh OUT peers                 CPU: beside llama.cpp; PEER_PYTHON has cyllama, LLAMA_BENCH is its program
#
# A step whose file is in OUT already is left out; one that fails or takes longer than its seconds leaves NAME.failed.
# PYTHON names the interpreter, PYTEST more options for the tests, CATS_COMMIT the commit where the sources are no checkout.
# GEMMA names the GGUF file of Gemma 3 270M (docs/reproduce.md): then "quantised" measures it too. LIMIT and TOKENS make it smaller.
set -u
usage() { sed -n '4,6s/^# *//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
out=$1; shift
mkdir -p "$out"
python=${PYTHON:-python3}

step() { # NAME SECONDS COMMAND...: the command writes $work, or prints what belongs there
    name=$1 seconds=$2; shift 2
    [ -e "$out/$name" ] && return
    echo "$(date +%T) $name"
    work=$out/$name.work
    rm -f "$work" "$out/$name.failed"
    if timeout "$seconds" "$@" > "$out/$name.log" 2>&1; then
        [ -e "$work" ] && mv "$work" "$out/$name" || mv "$out/$name.log" "$out/$name"
    else
        mv "$out/$name.log" "$out/$name.failed"
        tail -3 "$out/$name.failed"
    fi
}
bench() { step "$1" "$2" $python -m cats bench $3 -o "$out/$1.work"; }

tests() {
    step tests.log 600 $python -m pytest -q ${PYTEST:-} -k "not sanitizer and not past_2_31" \
        tests/ops tests/test_fusion.py tests/decode tests/benchmarks/test_timeline.py
    # takes most of a GPU's memory for itself
    step tests-large.log 200 $python -m pytest -q -k past_2_31 tests/ops/mlp/test_gated_mlp.py
}

sanitize() {
    # not beside the tests: their tables then no longer fit into the memory
    for tool in memcheck synccheck racecheck; do
        step $tool.log 400 $python -m tests.ops.sanitize_cuda $tool &
    done
    wait
}

mlp() {
    bench mlp-1.jsonl 400 "mlp --shape 4096x14336 --shape 4096x11008 --shape 2048x8192 --shape 896x4864 --shape 576x1536"
    bench mlp-2.jsonl 120 "mlp --shape 4096x14336 --shape 4096x11008 --batch 2 --backend cuda --no-compiled --sparsity 0,0.5,0.7"
}

model() { step model.jsonl 300 $python -m cats bench model --shape mistral-7b --layers 8 -o "$out/model.jsonl.work"; }

# `compiled` by itself: `stream` lays out the dense model's weights for its kernels. `generate` beside it.
decode() {
    for shape in mistral-7b llama-2-7b llama-3.2-1b smollm2-135m; do
        bench decode-$shape-compiled.jsonl 200 "decode $shape --dtype bfloat16 --engine compiled"
        bench decode-$shape-stream.jsonl 150 "decode $shape --dtype bfloat16 --engine stream --no-generate --launches"
    done
    bench decode-mistral-7b-static.jsonl 200 "decode mistral-7b --dtype bfloat16 --engine stream --static --sparsity 0"
}

contexts() {
    for prompt in 8192 32000; do
        bench decode-mistral-7b-$prompt.jsonl 150 \
            "decode mistral-7b --dtype bfloat16 --engine stream --no-generate --sparsity 0,0.5 --rounds 3
            --prompt-length $prompt"
    done
}

batches() {
    for batch in 2 4 8; do
        bench decode-llama-3.2-1b-batch-$batch.jsonl 150 \
            "decode llama-3.2-1b --dtype bfloat16 --engine auto --no-generate --sparsity 0,0.5 --rounds 3 --batch $batch"
    done
}

# The MLP over codes, each number of bits as a file of its own.
codes() {
    shapes="--shape 4096x14336 --shape 4096x11008 --shape 2048x8192"
    bench quantised-mlp-int4.jsonl 200 "mlp $shapes --bits 4 --sparsity 0,0.5,0.7 --batch 1,8"
    bench quantised-mlp-int8.jsonl 200 "mlp $shapes --bits 8 --sparsity 0,0.5,0.7 --batch 1,8"
}

# Our loop and llama.cpp on one file, quiet and beside as many busy processes as processors and twice as many.
peers() {
    options="--peer-python ${PEER_PYTHON:-$python} ${LLAMA_BENCH:+--llama-bench $LLAMA_BENCH}"
    cores=$(nproc)
    mkdir -p "$out/peers"
    for load in 0 $cores $((2 * cores)); do
        bench peer-smollm2-q4_1-load-$load.jsonl 600 "peer smollm2-gguf --load $load $options"
    done
    for file in smollm2:q8_0 llama-3.2-1b:q4_0 llama-3.2-1b:q8_0; do
        model=${file%:*} kind=${file#*:}
        path=$out/peers/$model-$kind.gguf
        step peers/$model-$kind.log 900 $python -m cats export $model --type $kind -o "$path"
        for load in 0 $cores $((2 * cores)); do
            bench peer-$model-$kind-load-$load.jsonl 900 "peer $path --rounds 3 --load $load $options"
        done
    done
}

timeline() {
    for shape in mistral-7b llama-2-7b llama-3.2-1b; do
        bench timeline-$shape.jsonl 100 "timeline $shape"
    done
}

# Several processes fill one folder: each asks some of the tasks, the last one finds all answers and writes the report.
quality() {
    data=$1
    recipe="reproduce --model smollm2 -o $out/reproduce --text $data/text/c4_en.txt.gz --samples 110 --length 1024
        --sparsity 0.3,0.5,0.7,0.9 --data-dir $data --limit 3300 --dtype bfloat16 --batch-size 64 --no-speed
        --methods cats,relu,input"
    for tasks in hellaswag boolq arc_easy piqa,winogrande sciq,arc_challenge,openbookqa; do
        step answers-$tasks.log 500 $python -m cats $recipe --tasks $tasks &
    done
    wait
    step reproduce.log 300 $python -m cats $recipe --eval-text "$data/text/wikitext2_raw_test.txt.gz"
}

# SmolLM2 and Gemma in 16, 8 and 4 bits, dense and sparse; the checkpoints are deleted where all went well.
quantised() {
    data=$1 checkpoints=$out/quantised/checkpoints
    mkdir -p "$checkpoints"
    # unpacked once, before several processes look for it
    step quantised/smollm2.log 120 $python -c "from cats import smollm2; print(smollm2.checkpoint())"
    names=smollm2
    if [ -n "${GEMMA:-}" ]; then
        names="smollm2 gemma"
        step quantised/gemma.log 120 $python -c "
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
path, folder = map(Path, sys.argv[1:])
given = dict(gguf_file=path.name)
tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
dense = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(path.parent, quantization_config=dense, **given)
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)" "$GEMMA" "$checkpoints/gemma"
    fi
    for name in $names; do
        for kind in 8-rtn--1 8-gptq--1 8-rtn-64 4-rtn-64 4-rtn-32 4-gptq-64 4-gptq-32; do quantise $name $kind & done
        calibrate $name "$(model_of $name)" &
    done
    wait
    for name in $names; do
        for kind in int4-gptq-64 int8-gptq; do calibrate $name-$kind "$checkpoints/$name-$kind" & done
    done
    wait
    for name in $names; do perplexities $name & done
    for tasks in hellaswag boolq arc_easy,openbookqa piqa,winogrande sciq,arc_challenge; do answers $tasks & done
    wait
    answers openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq,sciq
    ls "$out/quantised/"*.failed > /dev/null 2>&1 || rm -r "$checkpoints"
}

model_of() { [ "$1" = smollm2 ] && echo smollm2 || echo "$checkpoints/$1"; }

quantise() { # NAME BITS-METHOD-GROUP
    bits=${2%%-*} rest=${2#*-}
    method=${rest%%-*} group=${rest#*-}
    kind=int$bits-$method; [ "$group" = -1 ] || kind=$kind-$group
    step "quantised/quantize-$1-$kind.log" 200 $python -m cats quantize "$(model_of "$1")" --bits "$bits" \
        --method "$method" --group "$group" --text "$data/text/c4_en.txt.gz" --dtype bfloat16 \
        --tokens "${TOKENS:-65536}" -o "$checkpoints/$1-$kind"
}

calibrate() { # NAME MODEL
    step "quantised/calibrate-$1.log" 150 $python -m cats calibrate "$2" --text "$data/text/c4_en.txt.gz" \
        --tokens "${TOKENS:-112640}" --dtype bfloat16 -o "$checkpoints/$1.safetensors"
}

perplexities() { # NAME
    set -- "$1" "$checkpoints/$1"
    step "quantised/perplexity-$1.log" 250 $python -m cats evaluate "$(model_of "$1")" \
        --thresholds "$2.safetensors" --text "$data/text/wikitext2_raw_test.txt.gz" --dtype bfloat16 \
        ${TOKENS:+--tokens $TOKENS} -o "$out/quantised/$1" \
        --quantised int8-rtn="$2-int8-rtn" --quantised int8-gptq="$2-int8-gptq" \
        --quantised int8-rtn-64="$2-int8-rtn-64" --quantised int4-rtn-64="$2-int4-rtn-64" \
        --quantised int4-rtn-32="$2-int4-rtn-32" --quantised int4-gptq-64="$2-int4-gptq-64" \
        --quantised int4-gptq-32="$2-int4-gptq-32" \
        --quantised-thresholds int4-gptq-64="$2-int4-gptq-64.safetensors" \
        --quantised-thresholds int8-gptq="$2-int8-gptq.safetensors"
}

answers() { # TASKS
    set -- "$1" "$checkpoints/smollm2"
    step "quantised/answers-$1.log" 300 $python -m cats evaluate smollm2 --thresholds "$2.safetensors" --tasks "$1" \
        --data-dir "$data" --limit "${LIMIT:-2000}" --dtype bfloat16 --batch-size 64 -o "$out/quantised/smollm2" \
        --quantised int4-gptq-64="$2-int4-gptq-64" \
        --quantised-thresholds int4-gptq-64="$2-int4-gptq-64.safetensors"
}

finetune() {
    data=$1
    c4=$data/text/c4_en.txt.gz
    general="bench finetune smollm2 --text $c4[:50%] --text $data/text/wikipedia_en.txt.gz --calibration-text $c4[:50%]
        --eval-text c4=$c4[50%:] --eval-text wikitext2=$data/text/wikitext2_raw_test.txt.gz --dtype bfloat16
        --batch-size 8 --steps 200 --eval-every 50 -o $out/finetune/general"
    task="bench finetune smollm2 --pairs $data/gsm8k/train.parquet --eval-pairs gsm8k=$data/gsm8k/test.parquet
        --accuracy --answer-batch-size 660 --calibration-text $c4[:50%] --block 640 --dtype bfloat16 --batch-size 32
        --epochs 1 --eval-every 100 --lr 3e-4 -o $out/finetune/gsm8k"
    rates="--lr 1e-5 --lr 3e-4 --lr 1e-3"
    for method in dense cats-50 cats-70 relu; do
        step finetune-$method.log 500 $python -m cats $general $rates --method $method \
            --distillation 0 --distillation 0.5 &
    done
    wait
    # one after another: answers in batches of 660 take up to 30 GB
    for method in dense cats-50 cats-70; do
        step finetune-gsm8k-$method.log 500 $python -m cats $task --method $method
    done
    step finetune-recalibrate.log 200 $python -m cats $general --lr 3e-4 --recalibrate 50 --method cats-50
}

# The runs of one benchmark as one file, as results/<device>/ holds them.
join() {
    for name in mlp decode timeline; do
        set -- "$out/$name"-*.jsonl
        [ ! -e "$1" ] || $python -m cats bench results join "$@" -o "$out/$name.jsonl"
    done
}

while [ $# -gt 0 ]; do
    case $1 in
        quality|quantised|finetune) needs="${needs:-} $1" ;;
        tests|sanitize|mlp|model|decode|contexts|batches|timeline|codes) $1 ;;
        *)
            [ -n "${needs:-}" ] && [ -d "$1/text" ] || usage
            for group in $needs; do $group "$1"; done
            needs= ;;
    esac
    shift
done
[ -z "${needs:-}" ] || usage
join
