"""Searches make the requested number of trials. No network is trained."""

import re

import pytest
from optuna.storages.journal import JournalFileBackend
from support.searches import (
    ROW,
    SMALL,
    Trainer,
    begun,
    check_finished,
    searched,
    settings,
    states,
    study_of,
    write_result,
)

from rigl_keras.experiments.reproduction import costs, plans
from rigl_keras.experiments.reproduction.results import Results
from rigl_keras.experiments.tuning import search, tables, tune, tune_command
from rigl_keras.experiments.tuning.search import Search
from rigl_keras.experiments.tuning.studies import end_with_a_line


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    found, study, results = begun(tmp_path_factory.mktemp("straight"))
    trainer = Trainer()
    assert search.search(found, study, results, train=trainer) == {}
    return found, study, results, trainer


def test_a_search(straight):
    found, study, results, trainer = straight
    check_finished(study, found, results, 12)
    for trial in study.trials():
        params = study.params(trial)
        assert 0.1 <= params["drop_fraction"] <= 0.6
        assert params["frequency"] in range(50, 1_001, 50)
    assert len(set(trainer.trained)) == len(trainer.trained)
    cut = states(study).count("PRUNED")
    assert len(trainer.trained) == 2 * 12 - cut
    assert {"PRUNED", "COMPLETE"} == set(states(study))
    # The frequency is in steps of the preset, where the default is 50.
    drop, frequency = settings(study)[0]
    assert found.runs(drop, frequency)[0] == plans.Run(
        ROW,
        SMALL,
        0.1,
        0,
        plans.updates_of(round(drop, 3), frequency // 2),
    )


def test_a_finished_search_is_not_repeated(straight):
    found, study, results, _ = straight
    before = (study.path / "journal.log").read_bytes()
    again, trainer = study_of(results, found), Trainer()
    again.begin()
    search.search(found, again, results, train=trainer)
    assert not trainer.trained
    assert (study.path / "journal.log").read_bytes() == before


def test_more_trials_go_on(straight, tmp_path):
    """The result is as if there had been as many from the start."""
    for trials in (5, 6, 12):
        found, study, results = begun(tmp_path, trials=trials)
        search.search(found, study, results, train=Trainer())
        assert len(states(study)) == trials
    assert settings(study) == settings(straight[1])


def test_another_seed_tries_others(straight, tmp_path):
    found, study, results = begun(tmp_path, trials=2, sampler_seed=1)
    search.search(found, study, results, train=Trainer())
    assert not set(settings(study)) & set(settings(straight[1]))


def test_trained_settings_are_taken(tmp_path):
    """The reference is the row's run, which any command may have trained."""
    found, study, results = begun(
        tmp_path, trials=1, drop_fraction=(0.3, 0.3), frequency=(100, 100, 1)
    )
    for run in found.reference():
        assert run.name == f"{ROW}-density0.1-seed{run.seed}"
        write_result(run, results)
    trainer = Trainer()
    search.search(found, study, results, train=trainer)
    assert not trainer.trained and states(study) == ["COMPLETE"]


def test_an_interrupted_trial_is_tried_again(tmp_path):
    """Its runs continue in the trial that repeats it."""
    found, study, results = begun(tmp_path, trials=3)
    trainer = Trainer()

    def interrupted(runs, *rest, **options):
        if len(trainer.trained) == 3:
            raise KeyboardInterrupt
        return trainer(runs, *rest, **options)

    with pytest.raises(KeyboardInterrupt):
        search.search(found, study, results, train=interrupted)
    assert states(study) == ["COMPLETE", "RUNNING"]
    before = settings(study)

    again = study_of(results, found)
    again.begin()
    search.search(found, again, results, train=trainer)
    assert [trial.number for trial in again.trials()] == [0, 2, 3]
    assert settings(again)[:2] == before
    check_finished(again, found, results, 3)
    assert len(trainer.trained) == len(set(trainer.trained)) == 6


def test_a_trial_that_is_claimed_is_left_alone(tmp_path):
    found, study, results = begun(tmp_path, trials=2)
    other = study_of(results, found)
    with study.claim(2) as first, other.claim(2) as second:
        assert (first.number, second.number) == (0, 1)
        assert first.params != second.params
        with other.claim(2) as third:
            assert third is None
        assert states(other) == ["RUNNING", "RUNNING"]
    with other.claim(2) as third, other.claim(2) as fourth:
        assert [third.params, fourth.params] == [first.params, second.params]


@pytest.mark.parametrize("writes", range(4))
def test_taking_over_may_end_at_any_write(tmp_path, monkeypatch, writes):
    """Another process can then take the trial over again."""
    _, study, results = begun(tmp_path, trials=1)
    with study.claim(1) as trial:
        params = trial.params
    append, left = JournalFileBackend.append_logs, list(range(writes))

    def full(self, logs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(KeyboardInterrupt), study.claim(1):
            pass
    with study.claim(1) as trial:
        assert trial.params == params


def test_failures(tmp_path):
    """Failures count as trials, and the next command tries again."""
    found, study, results = begun(tmp_path, trials=3)
    first = []

    def fails(run):
        first.append(run)
        return run.changes == first[0].changes and run.seed == 1

    trainer = Trainer(fails)
    failed = search.search(found, study, results, train=trainer)
    ((run, reason),) = failed.items()
    assert (run.changes, run.seed) == (first[0].changes, 1)
    assert reason == "no luck"
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials()[0].user_attrs["failure"] == f"{run.name}: no luck"
    assert len(trainer.trained) == 6  # once each
    table = tables.trial_table(found, study, results).splitlines()
    assert table[3].split()[:2] == ["0", "failed"]
    assert table[4].startswith("Trial 0 failed, and is begun again by the")
    assert table[4].endswith(f"{run.name}: no luck")

    before = settings(study)
    study.begin()
    study.begin()  # queues nothing twice
    trainer = Trainer()
    assert search.search(found, study, results, train=trainer) == {}
    check_finished(study, found, results, 3)
    assert settings(study) == [*before[1:], before[0]]
    assert trainer.trained == [run]  # the other seed has its result


def test_the_rule_of_cutting(tmp_path):
    found, study, results = begun(tmp_path, trials=100)

    def complete(after_one, after_two):
        with study.claim(100) as trial:
            trial.report(after_one, 1)
            trial.report(after_two, 2)
            study.finish(trial, value=after_two)

    def hopeless(*means):
        with study.claim(100) as trial:
            for seeds, mean in enumerate(means, 1):
                trial.report(mean, seeds)
            found = study.is_hopeless(trial)
            study.finish(trial)
        return found

    for mean in (0.5, 0.1, 0.3, 0.2):
        complete(mean, mean + 0.1)
    assert not hopeless(0.0)  # only 4 are complete
    complete(0.4, 0.5)
    assert hopeless(0.19)  # the lowest quarter of 0.1, ..., 0.5 ends at 0.2
    assert not hopeless(0.2)
    assert hopeless(0.25, 0.29) and not hopeless(0.25, 0.31)
    assert not hopeless(0.31, 0.0)  # its best mean counts


def test_nothing_is_cut_without_pruning(straight, tmp_path):
    found, study, results = begun(tmp_path)
    trainer = Trainer()
    search.search(found, study, results, train=trainer, prune=False)
    assert states(study) == 12 * ["COMPLETE"]
    assert len(trainer.trained) == 24
    assert settings(study)[:10] == settings(straight[1])[:10]


def test_a_study_of_other_ranges_is_not_continued(straight):
    found, study, results, _ = straight
    for other, flags in (
        ({"frequency": (50, 500, 50)}, "--frequency=50,500,50, for"),
        ({"seeds": (0,)}, "--seeds=0, for"),
    ):
        changed = searched(**other)
        with pytest.raises(ValueError, match=flags) as error:
            study_of(results, changed).begin()
        assert "move that folder away" in str(error.value)
        assert "was made with --" in str(error.value)


def test_a_study_that_cannot_be_written(tmp_path):
    results = Results(tmp_path, "small")
    (results.path / "studies").write_text("")
    with pytest.raises(ValueError, match="cannot be written.*--results_dir"):
        study_of(results, searched()).begin()
    (results.path / "studies").unlink()
    study = study_of(results, searched())
    study.begin()
    (study.path / "journal.log").write_text("nonsense\nnonsense\n")
    with pytest.raises(ValueError, match="is not the journal.*Move"):
        study_of(results, searched()).begin()


def test_looking_at_a_study_writes_nothing(tmp_path):
    """It writes nothing, even if a process was killed before it made one."""
    study = study_of(Results(tmp_path, "small"), searched())
    study.path.mkdir(parents=True)
    (study.path / "journal.log").touch()
    assert study_of(Results(tmp_path, "small"), searched()).trials() == []
    assert [path.name for path in study.path.iterdir()] == ["journal.log"]


@pytest.mark.parametrize("text", ["", "a\n", "a\nb\n", "a\nb", "b"])
def test_what_is_left_of_a_line_is_cut(tmp_path, text):
    path = tmp_path / "journal.log"
    path.write_text(text)
    end_with_a_line(path)
    assert path.read_text() == text[: text.rfind("\n") + 1]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"density": 0.0}, r"--density .* \(0, 1\].*Received: .*0.0"),
        ({"density": 1.5}, r"--density .* \(0, 1\].*Received: .*1.5"),
        ({"seeds": ()}, "--seeds takes at least one.*Received: none"),
        ({"seeds": (0, 0)}, "each once.*Received: 0,0"),
        ({"trials": 0}, "--trials must be an int of at least 1"),
        ({"sampler_seed": -1}, "--sampler_seed must be"),
        ({"drop_fraction": (0.6, 0.1)}, "lowest and the highest.*0.6,0.1"),
        ({"drop_fraction": (0.3,)}, "--drop_fraction takes.*Received: 0.3"),
        ({"drop_fraction": (0.0, 0.5)}, "--drop_fraction takes"),
        ({"drop_fraction": (0.1234, 0.5)}, "to three digits"),
        ({"drop_fraction": (float("nan"), 0.5)}, "--drop_fraction takes"),
        ({"frequency": (50, 1000)}, "--frequency takes.*Received: 50,1000"),
        ({"frequency": (50, 975, 50)}, "plus a number of steps"),
        ({"frequency": (0, 100, 50)}, "above 0"),
        ({"frequency": (50, 100, 0)}, "--frequency takes"),
        ({"frequency": (1, 100, 1)}, "below one step of the preset"),
        ({"row": "rigl_erk_resnet50"}, r"is for \*_wrn.*--preset=full"),
    ],
)
def test_nonsense(options, says):
    options = {"row": ROW, "preset": SMALL, "density": 0.1, **options}
    with pytest.raises(ValueError, match=says):
        Search(**options)


def test_without_validation_nothing_can_be_compared(tmp_path):
    path = tmp_path / "own.gin"
    path.write_text("train.validation = 0\n")
    with pytest.raises(ValueError, match="has no validation examples"):
        Search(ROW, plans.Preset(str(path)), 0.1)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["figure2"], "one of updates, learning_rate. Received: figure2"),
        (["updates", "--distribution=er"], "uniform, erk. Received: 'er'"),
        (["learning_rate", "--trials=3"], "Received: --trials. Leave"),
        (["updates", "--frequency=50,x"], "whole numbers.*Received: '50,x'"),
    ],
)
def test_nonsense_on_the_command_line(arguments, says, monkeypatch, capsys):
    from absl import app, flags

    monkeypatch.setattr(flags, "FLAGS", values := flags.FlagValues())
    for name in ("string", "list", "bool", "integer", "float"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(
            flags,
            f"DEFINE_{name}",
            lambda *rest, define=define: define(*rest, flag_values=values),
        )
    monkeypatch.setattr(
        app, "run", lambda run, **options: run(values(["", *arguments]))
    )
    with pytest.raises(SystemExit) as exit:
        tune_command.main()
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("tune: ") and len(said.splitlines()) == 1
    assert re.search(says, said)


def test_what_is_shown(tmp_path, monkeypatch, capsys):
    """The plan, each trial, all trials and the row of Table 4 are printed."""
    monkeypatch.setattr(costs, "seconds_of_step", lambda network: 0.1)
    results = Results(tmp_path, "small")
    found = searched(trials=8)
    assert tune.updates(found, results, dry_run=True) == {}
    said = capsys.readouterr().out
    assert "8, each of seeds 0,1: 0 finished, 8 to do" in said
    assert "at most 18 runs, with the reference's: 2.98e+13 FLOPs" in said
    # 18 runs of 2,112 steps of 0.1 s.
    assert "about 1.1 h" in said and "100 are 50 here" in said
    assert not (results.path / "studies").exists()

    tune.updates(found, results, train=Trainer())
    said = capsys.readouterr().out
    study = study_of(results, found)
    assert said.count(" complete: validation accuracy") == states(study).count(
        "COMPLETE"
    )
    table = said[said.index("trial  state") :].splitlines()
    assert len(table[1:9]) == 8 and table[9] == ""
    best = max(study.trials(), key=lambda trial: trial.value)
    drop, frequency = study.params(best).values()
    mean, std = 100 * best.value, 0.1 / 2**0.5
    assert table[1].split() == [
        str(best.number),
        "complete",
        f"{drop:.3f}",
        f"{frequency}",
        f"{frequency // 2}",
        *f"{mean:.2f} +- {std:.2f}".split(),
        *f"{mean - 1:.2f} +- {std:.2f}".split(),
        "0,1",
    ]
    line = table[11].split()
    assert line[:4] == [f"{ROW},", "here", "0.1", "0.3,"]
    # The reference: 0.9 - 0.1^2 - 0.15^2 + 0.0005, less one point in test.
    assert line[4:8] == ["100", "85.80", "+-", "0.07"]
    gain = mean - 86.80
    assert f"the optimum is +{gain:.2f} points" in table[-1]

    assert tune.updates(found, results, dry_run=True) == {}
    again = capsys.readouterr().out
    assert "8 finished, 0 to do" in again and "at most 0 runs" in again
    assert again[again.index("trial  state") :].splitlines() == table


@pytest.mark.slow
def test_the_grid_is_figure_2(tmp_path, monkeypatch, capsys):
    asked = []

    def reproduce(runs, results, **options):
        asked.extend(runs)
        for run in runs:
            write_result(run, results)
        return {}

    monkeypatch.setattr(tune, "reproduce", reproduce)
    results = Results(tmp_path, "small")
    assert tune.learning_rate(ROW, SMALL, 0.2, results, seeds=(0, 1)) == {}
    figure = plans.runs("figure2", preset=SMALL, densities=[0.2], seeds=[0, 1])
    assert asked == [run for run in figure if run.row == ROW]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 1 + 16 + 1 + 1
    assert said[2].split()[1:3] == ["0.4", "500"]  # 250 steps
    assert said[-1].startswith("Best of 16 of 16 settings by validation")
    assert "accuracy, 89.80%: learning rate" in said[-1]
    with pytest.raises(ValueError, match="--density"):
        tune.learning_rate(ROW, SMALL, 2.0, results)
