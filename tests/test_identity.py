"""Files by which a workdir knows what it is of, where they hold something else."""

import pytest
from etils import epath

from configs import default
from semiseg_jax import identity, record
from semiseg_jax.errors import UserError
from semiseg_jax.reporting import run


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"data": 1}', "{"])
def test_another_form_is_refused_as_damage_is(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    # Nothing was made yet that the file could be of.
    assert identity.known(epath.Path(tmp_path), name) is None
    (tmp_path / "round_0").mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.*\): restore it, or give"):
        identity.known(epath.Path(tmp_path), name)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{"])
def test_to_a_report_another_form_is_as_missing(content, tmp_path):
    for name in ("results.json", record.RUN):
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(default.get_config().to_json_best_effort())
    found = run.read(tmp_path)
    assert (found.rows, found.curve, found.about) == ([], [], None)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"has no config\.json: give the --workdir of a run"):
        run.read(tmp_path)
