"""Made-up folders of results."""

import json

from rigl_keras.experiments.reproduction import plans


def made(
    results,
    row,
    density,
    seed,
    accuracy,
    *,
    preset="full",
    folder=None,
    changes=(),
    flops=(0.17, 0.16),
    validation=None,
    epochs=250,
    updates=(0.3, 100),
    rate=0.1,
    result=(),
):
    """Writes the files that bin/reproduce leaves for a finished run."""
    about = {
        "row": row,
        "preset": preset,
        "density": density,
        "seed": seed,
        "changes": dict(changes),
    }
    parts = [row, *([] if density is None else [f"density{density:g}"])]
    parts += [f"{n.split('.')[-1].lower()}{v:.6g}" for n, v in changes]
    path = results / preset / (folder or "-".join([*parts, f"seed{seed}"]))
    run = path / "run"
    run.mkdir(parents=True)
    (path / "about.json").write_text(json.dumps(about))
    train, test = flops
    content = {
        "method": "RigL",
        "model": "wrn_22_2",
        "dataset": "cifar10",
        "seed": seed,
        "density": density or 1.0,
        "test_accuracy": accuracy,
        "validation_accuracy": validation or accuracy,
        "test_loss": 0.3,
        "validation_loss": 0.3,
        "inference_flops": test * 1e8,
        "inference_flops_ratio": test,
        "training_flops": 1e15,
        "training_flops_ratio": train,
        "training_flops_ratio_closed_form": train,
        "training_flops_ratio_with_sources": train + 0.3,
        "parameters": 1_000_000,
        "nonzeros": 100_000,
        "steps": 88_000,
        "seconds": 3600.0,
        "layers": [
            {"name": "conv1", "shape": [3, 3, 3, 16], "density": 1.0},
            {"name": "head", "shape": [64, 10], "density": density or 1.0},
        ],
        "settings": {
            "density": density,
            "epochs": epochs,
            "length": 1.0,
            "batch_size": 128,
            "masks_from": None,
            "method": {
                "drop_fraction": updates[0],
                "frequency": updates[1],
                "seed": seed,
            },
        },
        "versions": {"tensorflow": "2.21.0", "keras": "3.15.1"},
    } | dict(result)
    (run / "result.json").write_text(json.dumps(content))
    (run / "config.gin").write_text(f"sgd.learning_rate = {rate}\n")
    curve = "step,inference_flops\n0,1e7\n100,1.5e7\n200,1.6e7\n"
    (run / "flops.csv").write_text(curve)
    history = "epoch,accuracy,val_accuracy\n0,0.1,0.2\n1,0.5,0.4\n"
    (run / "metrics.csv").write_text(history)
    return path


def failed(results, row, density, seed, reason, *, preset="full"):
    path = results / preset / f"{row}-density{density:g}-seed{seed}"
    path.mkdir(parents=True)
    about = {"row": row, "preset": preset, "density": density, "seed": seed}
    (path / "about.json").write_text(json.dumps(about | {"changes": {}}))
    if reason is not None:
        (path / "failure.txt").write_text(reason + "\n")
    return path


def one_row(folder):
    """Writes RigL (ERK) at 0.1 with three seeds, and a dense run."""
    for seed, accuracy in enumerate((0.92, 0.93, 0.955)):
        made(folder, "rigl_erk_wrn", 0.1, seed, accuracy)
    made(folder, "dense_wrn", None, 0, 0.94, flops=(1.0, 1.0))
    return folder


def lines_of(made_report, **wanted):
    """Returns the lines of report.csv with these values, as dicts."""
    head, *lines = made_report.lines
    found = [dict(zip(head, line, strict=True)) for line in lines]
    return [
        line
        for line in found
        if all(line[name] == value for name, value in wanted.items())
    ]


def searched(results):
    """Writes three settings; the best on test is not the best on validation."""
    settings = [(0.2, 50, 0.95, 0.91), (0.4, 200, 0.96, 0.90)]
    for fraction, frequency, validation, accuracy in settings:
        changes = plans.updates_of(fraction, frequency)
        for seed in range(3):
            made(
                results,
                "rigl_erk_wrn",
                0.1,
                seed,
                accuracy,
                changes=changes,
                validation=validation,
                updates=(fraction, frequency),
            )
    # The best accuracy, but not all seeds.
    made(
        results,
        "rigl_erk_wrn",
        0.1,
        0,
        0.99,
        changes=plans.updates_of(0.5, 900),
        updates=(0.5, 900),
    )
