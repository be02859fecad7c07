"""Three toy kinds beside each other, registered as if they stood in train/heads."""

from dataclasses import dataclass

from common.config import setting
from tests.train.heads import dflash, mtp, peagle
from train.config import TrainConfig
from train.heads import KINDS
from train.heads.head import HEADS

ALL = {
    "mtp": (mtp.Settings, mtp.Mtp),
    "p-eagle": (peagle.Settings, peagle.PEagle),
    "dflash": (dflash.Settings, dflash.DFlash),
}


@dataclass(frozen=True)
class Config(TrainConfig, *(settings for settings, _ in ALL.values())):
    """With the settings of all."""

    kind: str = setting("mtp", "Kind of the head.", choices=("eagle3", *ALL))


def register(monkeypatch):
    """The lines of the two tables."""
    for name, (settings, head) in ALL.items():
        monkeypatch.setitem(KINDS, name, settings)
        monkeypatch.setitem(HEADS, name, head)
