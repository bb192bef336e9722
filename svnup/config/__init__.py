"""From a composed configuration to a checked job; every mistake surfaces here, before a weight is loaded."""

from svnup.config.build import build, elsewhere, stored
from svnup.config.components import Texts
from svnup.config.job import Job, config_key
from svnup.config.messages import check_choices, defaults, explain
from svnup.config.schema import CONF, GROUPS, KeepSecrets, choices, composed, register

__all__ = [
    "CONF",
    "GROUPS",
    "Job",
    "KeepSecrets",
    "Texts",
    "build",
    "check_choices",
    "choices",
    "composed",
    "config_key",
    "defaults",
    "elsewhere",
    "explain",
    "register",
    "stored",
]
