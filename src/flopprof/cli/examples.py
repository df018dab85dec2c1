"""Examples under each command's --help: all together they use each of its options."""

from __future__ import annotations

# Of what every command that runs models takes.
_MODELS = (
    "net.py:build --input 8x128:int64 --train",
    "resnet18 --device cpu --dtype bfloat16",
    "resnet50 --model-arg num_classes=10",
    "timm:resnet50 --image-size 288",
    "gpt2 --batch 2 --seq 512 --attn eager",
    "gpt2 --train --checkpointing --reentrant",
    "vit_b_16 --frozen 'encoder.layers.*'",
    "llama-3.1-8b --lora r=16,targets=q_proj,v_proj",
    "net.py:experts --routing routing.json",
    "qwen2-vl-2b --images 2",
    "whisper-tiny --audio-seconds 10",
    "hf:ORG/NAME --trust-remote-code --traceback",
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "count": (
        "resnet50 --backward",
        "resnet50 --depth 2 --by operator --unit mac",
        "net.py:build --input 1x128:int64 --strict --no-fold",
        "gpt2 --attention causal --json - --csv gpt2.csv",
        "resnet50 --html page.html --markdown tables.md",
        "resnet50 --speedscope stacks.json --folded stacks.txt",
        "net.py:experts --device cpu --save-routing routing.json",
        "llama-3.1-8b --mode decode --context 8192 --hardware H100",
        "llama-3.1-8b --mode generate --prompt 512 --new 64",
        *_MODELS,
    ),
    "reconcile": (
        "llama-3.1-8b --seq 8192 --backward",
        "gpt2 --tokens 1024 --attention causal",
        "resnet50 --json - --html why.html",
        *_MODELS,
    ),
    "crosscheck": ("resnet50 --backward", "gpt2 --seq 256 --json -", *_MODELS),
    "check": (
        "resnet50 --max-flops 8.2G --max-params 26M",
        "net.py:build --baseline baseline.json --tolerance 0.5%",
        "gpt2 --backward --attention causal --no-fold --max-flops 8T",
        "resnet50 --max-flops 8.2G --json - --html budget.html",
        *(f"{line} --max-flops 9P" for line in _MODELS),
    ),
    "compare": (
        "resnet18 resnet50 vit_b_16 --hardware H100 --sort flops",
        "'timm:convnext*' --resume rows.jsonl --csv convnext.csv",
        "resnet18 resnet50 --at batch=8 --at batch=8,image_size=288",
        "resnet18 resnet34 --measure --workers 0",
        "gpt2 opt-125m --attention causal --json -",
        "gpt2 'gpt2 --attn eager' --markdown rows.md --html rows.html",
        *_MODELS,
    ),
    "diff": (
        "before.json after.json",
        "before.json after.json --phase backward --rows 5",
        "before.json after.json --json - --html diff.html --traceback",
    ),
    "models": ("llama", "'qwen3-*' --json -", "whisper --traceback"),
    "peaks": ("H100", "--measure --dtype bf16", "--measure --seconds 0.5 --json - --traceback"),
    "plan": (
        "--params 7e9 --tokens 1e12 --hardware H100 --mfu 0.5 --price 2",
        "--flops 3.8e25 --hardware H100 --devices 16384 --days 54",
        "--params 46.7e9 --active-params 12.9e9 --tokens 1T --peak 989T",
        "--shape layers=32,d_model=4096,heads=32,vocab=32000 --seq 2048",
        "llama-2-7b --tokens 2T --device-hours 184k --hardware A100",
        "llama-2-7b --tokens 2T --hardware A100 --count-by 6nd",
        "gpt2 --tokens 9B --hardware A100 --price 2 --cost 500",
        "gpt2 --tokens 9B --hardware A100 --power 400 --pue 1.1 --co2 0.4",
        "llama-3.1-70b --hardware H100 --zero 3 --devices 64",
        "llama-3.1-70b --hardware H100 --tp 8 --sequence-parallel --pp 4",
        "llama-2-7b --checkpointing full --precision bf16 --optimizer sgd",
        "gpt2 --micro-batch 8 --keep-scores --dropout",
        "llama-3.1-8b --hardware H100 --batch 32 --context 8192",
        "llama-3.1-8b --hardware H100 --weight-bits 4 --serving-devices 2",
        "llama-3.1-8b --dtype fp16 --peak 312T --bandwidth 2T",
        "llama-3.1-8b --mesh tp=8,sp,pp=4,dp=16 --micro-batches 8",
        "--published --json - --html runs.html --traceback",
    ),
    "report": (
        "run.jsonl",
        "run.rank0.jsonl run.rank1.jsonl --json -",
        "run.jsonl --html run.html --traceback",
    ),
    "run": (
        "train.py --lr 3e-4",
        "--records run.jsonl --html run.html -m package.train",
        "--peak 312T --attention causal --convention palm train.py",
        "--hardware A100-40GB --every 10 --json run.json train.py",
        "--quiet --traceback train.py",
    ),
}
# What another program begins, or gives.
_AROUND = {
    "diff": "flopprof count resnet50 --json - | flopprof diff resnet18.json -",
    "run": "torchrun --nproc-per-node 2 -m flopprof run train.py",
}


def epilog(command: str) -> str:
    """The examples of a command, one a paragraph."""
    lines = [f"flopprof {command} {line}" for line in EXAMPLES[command]]
    if command in _AROUND:
        lines.append(_AROUND[command])
    return "\n\n".join(["Examples:", *lines])
