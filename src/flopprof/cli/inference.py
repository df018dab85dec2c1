"""`flopprof count --mode`: what generating text takes; the options of `count` that are only for that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flopprof.cli.files import Files
from flopprof.cli.options import Wanted
from flopprof.cli.output import STDOUT, progress, show, write_text
from flopprof.errors import UncountedOperators, UsageError

if TYPE_CHECKING:
    from flopprof.hardware import Device
    from flopprof.profile import Attention

_PANEL = "Generating text (Hugging Face models)"

# Options of `count` that say nothing about generating text.
_OTHERS = {
    "backward": "--backward",
    "train": "--train",
    "inputs": "--input",
    "checkpointing": "--checkpointing",
    "frozen": "--frozen",
    "depth": "--depth",
    "by": "--by",
    "unit": "--unit",
    "csv": "--csv",
    "markdown": "--markdown",
    "speedscope": "--speedscope",
    "folded": "--folded",
    "save_routing": "--save-routing",
}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How text is generated, as the options say it; `taken` makes options of the fields."""

    mode: Annotated[
        Literal["prefill", "decode", "generate"] | None,
        typer.Option(
            help="prefill: the prompt, which fills the cache; decode: one token after --context; generate: a prefill "
            "of --prompt and the steps that make --new tokens.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens in the cache before the step of --mode decode; default 4096, or as far as positions reach.",
            metavar="N",
            min=1,
            rich_help_panel=_PANEL,
        ),
    ] = None
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompt, as --seq; of an encoder-decoder the encoder's.",
            metavar="P",
            min=1,
            rich_help_panel=_PANEL,
        ),
    ] = None
    new: Annotated[
        int | None,
        typer.Option(help="Tokens that --mode generate makes.", metavar="M", min=1, rich_help_panel=_PANEL),
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(
            help="A device that flopprof peaks lists (H100): times at best, and from which batch on decoding is not "
            "bound by memory. With --html: whose roof the page shows first.",
            metavar="DEVICE",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def check(self) -> None:
        """Raises UsageError for options that are wrong whatever the model is: said before torch is imported."""
        given = {"--context": self.context, "--prompt": self.prompt, "--new": self.new}
        if self.mode is None and self.asked:
            option = next(option for option, value in given.items() if value is not None)
            raise UsageError(f"{option} is about generating text: add --mode prefill, decode or generate.")

    @property
    def asked(self) -> bool:
        """Is any of them given that is only for this?"""
        return any(value is not None for value in (self.mode, self.context, self.prompt, self.new))

    def roof(self, html: str | None) -> Device | None:
        """The device of --hardware, for the page of --html. Raises UsageError where it is about nothing."""
        if self.hardware is None:
            return None
        if html is None:
            raise UsageError(
                "--hardware is about generating text, or about the roof of --html: add --mode prefill, decode or "
                "generate, or --html FILE."
            )
        from flopprof.hardware import device

        return device(self.hardware)

    def run(
        self, ctx: typer.Context, wanted: Wanted, files: Files, *, attention: Attention, fold: bool, strict: bool
    ) -> None:
        """Prints, or writes as JSON, what generating text takes. Raises UsageError for options that do not fit."""
        assert self.mode is not None
        for name, option in _OTHERS.items():
            source = ctx.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(f"{option} and --mode {self.mode} do not go together: leave one of them out.")
        from flopprof.inference.bounds import Rates
        from flopprof.inference.sizes import check_sizes

        check_sizes(
            self.mode,
            context=self.context,
            prompt=self.prompt,
            new=self.new,
            batch=wanted.batch,
            seq=wanted.seq,
        )
        Rates.read(self.hardware)
        with progress(f"Counting {wanted.target}"):
            from flopprof.inference.run import inference

            found = inference(
                replace(wanted, seq=None).load(),
                mode=self.mode,
                context=self.context,
                prompt=self.prompt,
                new=self.new,
                seq=wanted.seq,
                batch=wanted.batch,
                hardware=self.hardware,
                attention=attention,
                fold=fold,
                image_size=wanted.image_size,
                audio_seconds=wanted.audio_seconds,
                images=wanted.images,
            )
        uncounted = {op for profile in (found.prefill, found.decode) if profile is not None for op in profile.uncounted}
        if strict and uncounted:
            raise UncountedOperators(
                f"{wanted.target} runs operators that have no formula: {', '.join(sorted(uncounted))}. "
                "Give each one with flopprof.register_formula, or leave --strict out."
            )
        if files.json is not None:
            write_text(files.json, found.to_json())
        if files.html is not None:
            from flopprof.report.html.inference import render as page

            device = None if self.hardware is None else self.roof(files.html)
            write_text(files.html, page(found, hardware=device))
        if STDOUT not in (files.json, files.html):
            from flopprof.report.inference import render

            show(render(found))
