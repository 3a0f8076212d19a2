"""The commands of `riskmap`. A command's imports happen when it runs."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from riskmap_ext.finetune.base.errors import ConfigError, InputError, Terminated

app = typer.Typer(
    name="riskmap",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"riskmap_ext {version('riskmap-ext')}")
        raise typer.Exit


@app.callback()
def _riskmap(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Transfer risk maps and risk-weighted fine-tuning of segmentation networks."""


def _can_be_written(output: Path | None) -> Path | None:
    """Checks that the file can be written, before hours of work."""
    from riskmap_ext.finetune.base.files import is_image, named_output
    from riskmap_ext.finetune.folder.workspace import check_folder

    if output is not None:
        output = named_output(output)
        if is_image(output):
            raise InputError(f"--output: expected the name of a CSV file, got {output}")
        check_folder("--output", output.absolute().parent)
    return output


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file (docs/finetune.md).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Keys of the configuration, such as train.steps=500 'data.label_map={47: 1, 48: 1}'.",
    ),
]
Table = Annotated[
    Path | None, typer.Option(callback=_can_be_written, help="CSV file for the scores.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def _command(*examples: str, processes: bool = False) -> Callable[[Callable[..., None]], Any]:
    """Registers a function as the command of its name, with examples at the end of its help.

    Ctrl-C and SIGTERM end it with one line and the shell's code, 130 or 143. processes: whether
    torchrun may start several processes of it.
    """

    def register(function: Callable[..., None]) -> Any:
        name = function.__name__.lstrip("_")

        @functools.wraps(function)
        def run(**arguments: Any) -> None:
            many = os.environ.get("WORLD_SIZE", "1") != "1"
            if not processes and many and "TORCHELASTIC_RUN_ID" in os.environ:
                raise ConfigError(
                    f"torchrun: riskmap {name} is one process; start it without torchrun"
                )
            before = signal.signal(signal.SIGTERM, _terminate)
            hook, sys.unraisablehook = sys.unraisablehook, _stop_again
            try:
                _import_package()
                function(**arguments)
            except KeyboardInterrupt as stop:
                print(f"riskmap: {stop.args[0] if stop.args else 'stopped'}", file=sys.stderr)
                number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
                raise typer.Exit(128 + number) from None
            finally:
                signal.signal(signal.SIGTERM, before)
                sys.unraisablehook = hook

        # Blank lines keep each example on its own line.
        return app.command(name, epilog="\n\n".join(["Examples:", *examples]))(run)

    return register


def _terminate(*_: Any) -> None:
    raise Terminated


def _stop_again(lost: Any) -> None:
    """Python drops what is raised in a finalizer, such as the request to end: it is made again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _import_package() -> None:
    """Executes the package that riskmap_ext_command.py left empty to make --help fast."""
    package = sys.modules["riskmap_ext"]
    spec = package.__spec__
    if not hasattr(package, "__all__") and spec is not None and spec.loader is not None:
        spec.loader.exec_module(package)


@_command("riskmap demo --seeds 3", processes=True)
def _demo(
    output: Annotated[Path, typer.Option(help="Folder for the table, picture and page.")] = Path(
        "demo_output"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, with other subjects.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Fine-tuning steps of each run.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of parallel runs.")] = 2,
) -> None:
    """Compare ways to fine-tune on simulated brains: offline, a few minutes on two cores."""
    from riskmap_ext.demo import run as demo

    demo.run(output=output, seeds=seeds, steps=steps, workers=workers)


@_command(
    "riskmap rank run.yaml --source a.pt --source b.pt",
    "riskmap rank run.yaml --source a.pt data.train=10 --output ranking.csv",
)
def _rank(
    config: ConfigFile,
    source: Annotated[
        list[Path], typer.Option(help="Checkpoint of a source model; repeat for each one.")
    ],
    overrides: Overrides = None,
    output: Table = None,
    quiet: Quiet = False,
) -> None:
    """Score source models by LEEP on the training cases, to choose one before a week of training.

    The score is the mean log-likelihood of a voxel's label given the source's outputs; "told" is
    its gain over the class frequencies alone.
    """
    from riskmap_ext.finetune.base.files import write_rows
    from riskmap_ext.finetune.config.load import located_config
    from riskmap_ext.finetune.rank import rank_sources

    first = f"source.checkpoint={source[0]}"
    with located_config(config, [*(overrides or []), first]) as settings:
        ranked = rank_sources(settings, [each.absolute() for each in source], progress=not quiet)
    if output is not None:
        write_rows(output, ranked)


@_command(
    "riskmap map --source a.pt --image images --label labels --classes background,lesion "
    "--output maps",
    "riskmap map --source a.pt --image t1.nii.gz --label seg.nii.gz --output maps "
    "--classes background,lesion risk.scheme=power",
)
def _map(
    source: Annotated[Path, typer.Option(help="Checkpoint of the source model.")],
    image: Annotated[list[Path], typer.Option(help="Image file or folder of images.")],
    label: Annotated[list[Path], typer.Option(help="Label file or folder of labels.")],
    output: Annotated[Path, typer.Option(help="Folder for the maps and pictures.")],
    classes: Annotated[
        str | None,
        typer.Option(help="Class names, background first, separated by commas."),
    ] = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Write transferability and risk maps of labelled images as NIfTI and PNG.

    Give one --image and one --label folder (paired by name), or as many --label files as --image
    files, in the same order. The LEEP statistics come from these images.
    """
    from riskmap_ext.finetune.config.load import apply_overrides, parse_config
    from riskmap_ext.finetune.train.finetune import make_maps

    data = _map_files(image, label)
    if classes is not None:
        data["classes"] = [name.strip() for name in classes.split(",")]
    content = {"output": output, "source": {"checkpoint": source}, "data": data}
    apply_overrides(content, overrides or [])
    if not {"classes", "label_map"} & set(data):
        raise InputError(
            "--classes: missing; name the classes of the labels, background first, such as "
            "--classes background,lesion"
        )
    make_maps(parse_config(content, origin="riskmap map"), progress=not quiet)


@_command(
    "riskmap finetune run.yaml --dry-run",
    "riskmap finetune run.yaml output=runs/b train.steps=2000",
    "riskmap finetune run.yaml --resume",
    "riskmap finetune run.yaml --folds 5",
    "torchrun --nproc-per-node 2 -m riskmap_ext.finetune finetune run.yaml",
    processes=True,
)
def _finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the unfinished run in the output folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything; train and write nothing.")
    ] = False,
    folds: Annotated[
        str | None,
        typer.Option(
            help="Cross-validate: number of folds, or a file of splits such as nnU-Net's "
            "splits_final.json; same as data.folds."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a segmentation network; risk.use=true weights its loss by the transfer risk map.

    Without `source` in the configuration, it trains the network from scratch: use this to make a
    source model. With --folds, it trains one run per fold, in OUTPUT/fold_0, fold_1, ...
    """
    from riskmap_ext.finetune.config.load import located_config
    from riskmap_ext.finetune.dry_run import check_run
    from riskmap_ext.finetune.folder.workspace import is_done
    from riskmap_ext.finetune.train.cross_validation import cross_validate
    from riskmap_ext.finetune.train.finetune import finetune

    overrides = [*(overrides or []), *([] if folds is None else [f"data.folds={folds}"])]
    with located_config(config, overrides) as settings:
        if resume and is_done(settings):
            if not quiet and os.environ.get("RANK", "0") == "0":
                typer.echo(f"{settings.output} holds a finished run: there is nothing to resume")
            return
        train = finetune if settings.data.folds is None else cross_validate
        work: Callable[..., Any] = check_run if dry_run else train
        work(settings, progress=not quiet, resume=resume)


@_command("riskmap init DATA", "riskmap init DATA --source a.pt --output b.yaml")
def _init(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Contains dataset.json, images/ and labels/, imagesTr/ and labelsTr/, or BIDS.",
        ),
    ],
    source: Annotated[
        Path | None, typer.Option(help="Checkpoint of a source model to fine-tune.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE.yaml", help="The file to write.")] = Path(
        "run.yaml"
    ),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a first, commented configuration for a folder of images and labels.

    It runs without changes: paths, channels, classes, patch size and network come from the files.
    """
    from riskmap_ext.finetune.init import write_first_config

    path = write_first_config(
        folder, output, source=source, overwrite=overwrite, progress=not quiet
    )
    if not quiet:
        run = shlex.join(["riskmap", "finetune", str(path)])
        typer.echo(f"Written: {path}. Next:\n  {run} --dry-run\n  {run}")


@_command("riskmap report runs/a", "riskmap report runs/a --output a.html")
def _report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", callback=_can_be_written, help="Default: RUN/report.html."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML file of a run: curves, classes, cases, LEEP, settings.

    The page needs no other file and no internet access. The run may be unfinished.
    """
    from riskmap_ext.finetune.report.write import write_report

    path = write_report(run, output)
    if not quiet:
        typer.echo(f"Written: {path}")


@_command(
    "riskmap predict runs/a/last.pt --image scans --output segmentations",
    "riskmap predict runs/folds --image scans --output segmentations",
    "riskmap predict runs/a/last.pt --image scans --suffix _T1w,_FLAIR --output segmentations",
)
def _predict(
    checkpoint: Annotated[
        list[Path],
        typer.Argument(
            help="Folder of a run (its last.pt), best.pt, or a model of nnU-Net or MONAI. Several, "
            "or the folder of a cross-validation, form an ensemble (mean of their probabilities)."
        ),
    ],
    image: Annotated[list[Path], typer.Option(help="Image file or folder of images.")],
    output: Annotated[Path, typer.Option(help="Folder for the segmentations.")],
    suffix: Annotated[
        str | None,
        typer.Option(
            help="File name endings of the channels, such as _T1w,_FLAIR. Default for several "
            "channels: as in training."
        ),
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help="Order of the axes in the training files, such as LPS. Default for nnU-Net "
            "checkpoints: RAS."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overlap: Annotated[
        float, typer.Option(min=0.0, max=0.95, help="Overlap of neighbouring windows, as a share.")
    ] = 0.25,
    patch_size: Annotated[
        str | None, typer.Option(help="Window, such as 64,64,64. Default: as in training.")
    ] = None,
    overwrite: Overwrite = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip images that have a segmentation there.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Segment images with a trained checkpoint: NAME.nii.gz on each image's own grid.

    The checkpoint stores its network, its classes and the preprocessing. Values are class numbers,
    0 for the background.
    """
    from pydantic import ValidationError

    from riskmap_ext.finetune.config.schema import InferenceConfig
    from riskmap_ext.finetune.predict import predict_images

    sizes = None if patch_size is None else patch_size.split(",")
    try:
        inference = InferenceConfig.model_validate({"patch_size": sizes, "overlap": overlap})
    except ValidationError:
        why = f"expected whole numbers from 1 on, got {patch_size!r}"
        raise InputError(f"--patch-size: {why}") from None
    predict_images(
        checkpoint,
        image,
        output,
        suffix=None if suffix is None else [each.strip() for each in suffix.split(",")],
        orientation=orientation,
        device=device,
        inference=inference,
        overwrite=overwrite,
        skip_existing=skip_existing,
        progress=not quiet,
    )


@_command(
    "riskmap evaluate --prediction segmentations --reference labels",
    "riskmap evaluate --prediction segmentations --reference labels --structure whole=1,2 "
    "--structure core=1 --output scores.csv",
)
def _evaluate(
    prediction: Annotated[Path, typer.Option(help="Segmentation file or folder.")],
    reference: Annotated[Path, typer.Option(help="Reference label file or folder.")],
    structure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Such as lesion=1 or whole=1,2,3; repeat for each structure or region.",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of the NSD (surface Dice), in mm.")] = 1.0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Skip references without a prediction.")
    ] = False,
    output: Table = None,
    quiet: Quiet = False,
) -> None:
    """Compare segmentations with reference labels: Dice, HD95, NSD (surface Dice).

    Files are paired by name. A structure that the prediction misses scores 0 and is counted; one
    that only the prediction has is counted as extra; one that neither has is left out.
    """
    from riskmap_ext.finetune.base.files import write_rows
    from riskmap_ext.finetune.evaluate import score_files

    scores = score_files(
        prediction,
        reference,
        structures=_structures(structure or []),
        tolerance=tolerance,
        partial=partial,
        progress=not quiet,
    )
    if output is not None:
        write_rows(output, scores)


@_command("riskmap info", processes=True)
def _info() -> None:
    """Print versions, build facts and what runs on this machine."""
    from riskmap_ext import info

    typer.echo(info.report())


def _structures(given: list[str]) -> dict[str, list[int]] | None:
    try:
        pairs = ((name.strip(), values) for name, values in (each.split("=") for each in given))
        found = {name: [int(value) for value in values.split(",")] for name, values in pairs}
    except ValueError:
        found = {}
    if len(found) != len(given) or "" in found:
        raise InputError(f"--structure: expected distinct NAME=VALUE or NAME=1,2, got {given}")
    return found or None


def _map_files(image: list[Path], label: list[Path]) -> dict[str, Any]:
    """The `data` section for --image and --label."""
    from riskmap_ext.finetune.base.files import check_there

    check_there(("--image", image), ("--label", label))
    if len(image) == len(label) == 1 and image[0].is_dir() and label[0].is_dir():
        return {"images": image[0].resolve(), "labels": label[0].resolve()}
    if len(image) != len(label):
        raise InputError(
            f"--image and --label: expected as many of each, got {len(image)} and {len(label)}"
        )
    pairs = zip(image, label, strict=True)
    return {"cases": [{"image": one, "label": other} for one, other in pairs]}
