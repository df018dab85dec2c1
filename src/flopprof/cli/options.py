"""What commands that run a target have in common: its name, and how it is built and run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

RUN, REPORT = "What is run", "What is printed"

Target = Annotated[
    str,
    typer.Argument(
        help="A torchvision name (resnet50), one that flopprof models lists (llama-3.1-8b), timm:NAME, "
        "hf:ORG/NAME[@revision] or the directory of a Hugging Face checkpoint (weights are never read), "
        "path/to/file.py:function_or_class that returns a module, or (module, inputs), or "
        "the model.pt2 that torch.export.save wrote.",
        metavar="TARGET",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(help="Samples per batch.", metavar="N", min=1, rich_help_panel=RUN)]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the square images in pixels; default: what the model's own weights declare.",
        metavar="PIXELS",
        min=1,
        rich_help_panel=RUN,
    ),
]
Seq = Annotated[
    int | None,
    typer.Option(
        help="Tokens of text, image placeholders included; of both sides for encoder-decoders. Hugging Face models.",
        metavar="N",
        min=1,
        rich_help_panel=RUN,
    ),
]
AudioSeconds = Annotated[
    float | None,
    typer.Option(help="Length of the sound that a Hugging Face speech model hears.", metavar="S", rich_help_panel=RUN),
]
Images = Annotated[
    int,
    typer.Option(
        help="Pictures in each text of a Hugging Face model that reads both.", metavar="N", min=0, rich_help_panel=RUN
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a Hugging Face checkpoint brings; else none of it runs.",
        rich_help_panel=RUN,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="Shape of one positional input, with an optional dtype: 2x8, 1x128:int64. Repeat per input.",
        metavar="SHAPE",
        rich_help_panel=RUN,
    ),
]
Backward = Annotated[
    bool,
    typer.Option(
        "--backward",
        help="Also count the backward pass of the sum of the outputs, in eval mode unless --train.",
        rich_help_panel=RUN,
    ),
]
Train = Annotated[bool, typer.Option("--train", help="Run the model in training mode.", rich_help_panel=RUN)]
Device = Annotated[
    Literal["meta", "cpu", "cuda"] | None,
    typer.Option(
        help="Where the model runs; default: meta (no memory, no arithmetic) where that works, else cpu.",
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "float64"] | None,
    typer.Option(help="Cast the model and its floating inputs to this type.", rich_help_panel=RUN),
]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        help="Argument of the function or class that builds the model: num_classes=10. Repeat per argument.",
        metavar="NAME=VALUE",
        rich_help_panel=RUN,
    ),
]
Fold = Annotated[
    bool,
    typer.Option(
        "--fold/--no-fold",
        help="On meta, run a repeated block once and charge it to each, where that is proved to be the same; "
        "--no-fold runs every block.",
        rich_help_panel=RUN,
    ),
]
AttentionPairs = Annotated[
    Literal["full", "causal"],
    typer.Option(
        help="Attention convention: every query-key pair, or only those that the mask lets through.",
        rich_help_panel=RUN,
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.", rich_help_panel=REPORT)]
