import sys

from sft import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
