"""From a composed configuration to a checked job; every mistake surfaces here, before a weight is loaded."""

from svnup.config.build import Texts, build, stored
from svnup.config.job import Job, config_key
from svnup.config.messages import defaults, explain
from svnup.config.schema import CONF, GROUPS, KeepSecrets, register

__all__ = ["CONF", "GROUPS", "Job", "KeepSecrets", "Texts", "build", "config_key", "defaults", "explain", "register", "stored"]
