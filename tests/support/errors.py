"""What a refusal looks like."""

import pytest

from tav_core.checkpoint import load_checkpoint
from tav_core.errors import TavError


def refused(told, *args, call=load_checkpoint, **kwargs):
    """`call` tells in one line that what it was given is wrong."""
    with pytest.raises(TavError, match=told) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1
