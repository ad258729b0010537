import pytest

import cats
from cats import finetuning, recipes


@pytest.mark.parametrize("package", [cats, finetuning, recipes])
def test_every_public_name_is_there_and_no_other(package):
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) - {"__version__"} == set(dir(package)) - {"__version__"}
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no'"):
        _ = package.no
