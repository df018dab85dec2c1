"""What commands that run a target have in common: its name, and how it is built, varied and run."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from flopprof.errors import UsageError

if TYPE_CHECKING:
    from flopprof.models import Workload

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
Attn = Annotated[
    Literal["sdpa", "eager", "flash"] | None,
    typer.Option(
        help="How a Hugging Face model computes attention; default: sdpa where the model has it.",
        rich_help_panel=RUN,
    ),
]
Lora = Annotated[
    str | None,
    typer.Option(
        help="Low-rank adapters by peft, all else frozen, separated by commas: r=16 and targets= (names of "
        "modules, or all-linear); also alpha=, dropout=, modules_to_save=.",
        metavar="SETTINGS",
        rich_help_panel=RUN,
    ),
]
Frozen = Annotated[
    list[str] | None,
    typer.Option(
        help="Parameters or modules that do not train: 'embed*', 'layers.0'. Repeat per pattern.",
        metavar="GLOB",
        rich_help_panel=RUN,
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Run repeated blocks again in the backward, which is counted too; Hugging Face models checkpoint "
        "themselves, in training mode.",
        rich_help_panel=RUN,
    ),
]
Reentrant = Annotated[
    bool, typer.Option("--reentrant", help="With --checkpointing: the reentrant kind.", rich_help_panel=RUN)
]

Routing = Annotated[
    str | None,
    typer.Option(
        help="JSON of the tokens that each expert gets, by module: what routers choose on meta.",
        metavar="FILE",
        rich_help_panel=RUN,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be run, as the options say it; `taken` makes options of the fields."""

    target: Target
    batch: Batch = 1
    seq: Seq = None
    image_size: ImageSize = None
    audio_seconds: AudioSeconds = None
    images: Images = 1
    inputs: Inputs = None
    train: Train = False
    attn: Attn = None
    lora: Lora = None
    frozen: Frozen = None
    checkpointing: Checkpointing = False
    reentrant: Reentrant = False
    routing: Routing = None
    device: Device = None
    dtype: Dtype = None
    model_args: ModelArgs = None
    trust_remote_code: TrustRemoteCode = False

    def load(self) -> Workload:
        """The model and its inputs. Raises what `flopprof.load` raises."""
        from flopprof.models import load

        return load(self.target, **self.options())

    def options(self) -> dict[str, Any]:
        """What `flopprof.load` takes beside the target; values that JSON can hold."""
        return {
            "batch": self.batch,
            "image_size": self.image_size,
            "inputs": self.inputs or (),
            "device": self.device,
            "dtype": self.dtype,
            "train": self.train,
            "model_args": dict(parse_model_arg(text) for text in self.model_args or ()),
            "seq": self.seq,
            "audio_seconds": self.audio_seconds,
            "images": self.images,
            "trust_remote_code": self.trust_remote_code,
            "attn": self.attn,
            "lora": self.lora,
            "frozen": self.frozen or (),
            "checkpointing": ("reentrant" if self.reentrant else "non-reentrant") if self.checkpointing else None,
            "routing": self.routing,
        }

    def check(self) -> None:
        """Raises UsageError for options that are wrong whatever the target is: said before torch is imported."""
        if self.reentrant and not self.checkpointing:
            raise UsageError("--reentrant is a kind of --checkpointing: give both.")
        for text in self.model_args or ():
            parse_model_arg(text)


def taken(command: Callable[..., None]) -> Callable[..., None]:
    """The command with --traceback, and each parameter that is a dataclass of options replaced by its fields."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, tuple[type, tuple[str, ...]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            options = _options_of(parameter.annotation)
            groups[parameter.name] = parameter.annotation, tuple(option.name for option in options)
            parameters += options
        else:
            parameters.append(parameter)
    parameters.append(
        inspect.Parameter("traceback", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Traceback)
    )

    @functools.wraps(command)
    def run(ctx: typer.Context, **given: Any) -> None:
        ctx.meta["flopprof.traceback"] = given.pop("traceback")
        for name, (group, options) in groups.items():
            chosen = group(**{option: given.pop(option) for option in options})
            chosen.check()
            given[name] = chosen
        command(ctx, **given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return run


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def parse_model_arg(text: str) -> tuple[str, object]:
    """(name, value) of `num_classes=10`: a Python literal where it is one, else the text. Raises UsageError."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UsageError(f"cannot read --model-arg {text!r}: write it as name=value, as in num_classes=10.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
