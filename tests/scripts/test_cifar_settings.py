from collections.abc import Callable
from pathlib import Path

import pytest

from cifar.settings import CifarSettings
from experiment.errors import RunError
from experiment.optimizers import SGDSettings
from experiment.settings import differing_keys, load_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cifar"
TOML = """
epochs = 3
[optimizer]
name = "sgd"
lr = 0.1
"""

Load = Callable[..., CifarSettings]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)

    def write_and_load(*overrides: str, toml: str = TOML) -> CifarSettings:
        Path("run.toml").write_text(toml)
        return load_settings(CifarSettings, Path("run.toml"), overrides)

    return write_and_load


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_valid(config: Path) -> None:
    load_settings(CifarSettings, config)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(load: Load) -> None:
    settings = load("optimizer.lr=0.2", "epochs=5", "optimizer.lr=0.3", "data.name=cifar10")
    assert isinstance(settings.optimizer, SGDSettings)
    assert (settings.optimizer.lr, settings.epochs, settings.data.name) == (0.3, 5, "cifar10")


def test_an_override_may_choose_another_optimizer(load: Load) -> None:
    assert load("optimizer.name=adamw").optimizer.name == "adamw"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["optimizer.momentun=0.5"],
            "override optimizer.momentun=0.5: optimizer.momentun is not a setting of sgd; "
            "did you mean optimizer.momentum?",
        ),
        (["lr=1"], "override lr=1: lr is not a setting; did you mean optimizer.lr?"),
        (
            ["optimiser.lr=1"],
            "override optimiser.lr=1: optimiser is not a setting; did you mean optimizer?",
        ),
        (
            ["optimizer.damping=1"],
            "override optimizer.damping=1: optimizer.damping is not a setting of sgd; "
            "--help lists all settings.",
        ),
        (["epochs=0"], "override epochs=0: epochs must be greater than 0, but got 0."),
        (
            ["optimizer.lr=fast"],
            "override optimizer.lr=fast: optimizer.lr must be a valid number, but got 'fast'.",
        ),
        (
            ["model.channels_last=1"],
            "override model.channels_last=1: model.channels_last must be a valid boolean, "
            "but got 1.",
        ),
        (
            ["data.name=cifar1"],
            "override data.name=cifar1: data.name must be one of digits, cifar10, cifar100, "
            "but got 'cifar1'; did you mean 'cifar10'?",
        ),
        (
            ["optimizer.name=adaw"],
            "override optimizer.name=adaw: optimizer.name must be one of kfac, sgd, adamw, "
            "but got 'adaw'; did you mean 'adamw'?",
        ),
        (
            ["optimizer={}"],
            "override optimizer={}: optimizer.name is required, but is not set; "
            "choose one of kfac, sgd, adamw.",
        ),
        (["epochs.x=1"], "override epochs.x=1: epochs is a value, not a table of settings."),
        (["epochs"], "override epochs: must look like key=value, such as optimizer.lr=0.1."),
        (
            ["seed=-1", "epochs=1.5"],
            "override seed=-1: seed must be greater than or equal to 0, but got -1.\n"
            "override epochs=1.5: epochs must be a valid integer, but got 1.5.",
        ),
    ],
)
def test_a_wrong_override_is_refused_by_name(load: Load, overrides: list[str], lines: str) -> None:
    with pytest.raises(RunError) as error:
        load(*overrides)
    assert str(error.value) == lines


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        (TOML + "lrr = 1", "run.toml: optimizer.lrr is not a setting of sgd; did you mean opt"),
        ("epoch = 3" + TOML, "run.toml: epoch is not a setting; did you mean epochs?"),
        ('[optimizer]\nname = "sgd"', "run.toml: optimizer.lr is required, but is not set."),
        ("epochs = 3", "run.toml: optimizer is required, but is not set."),
        ("epochs = ", "run.toml is not valid TOML: Invalid value (at end of document)."),
    ],
)
def test_a_wrong_file_is_named(load: Load, toml: str, line: str) -> None:
    with pytest.raises(RunError) as error:
        load(toml=toml)
    assert str(error.value).startswith(line)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RunError, match=r"Cannot read the settings file nowhere\.toml: No such"):
        load_settings(CifarSettings, Path("nowhere.toml"))


def test_differing_keys_are_dotted(load: Load) -> None:
    one, other = load(), load("optimizer.lr=0.2", "data.batch_size=64")
    assert differing_keys(one.model_dump(), other.model_dump()) == [
        "data.batch_size",
        "optimizer.lr",
    ]
