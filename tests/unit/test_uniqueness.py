"""The names under which usage is billed once."""

import pytest

from usage_billing.uniqueness import identity, uniqueness_token


def test_same_total_has_the_same_name_in_every_process():
    """A name written down in a test is a name that a release cannot change by accident."""
    assert (
        identity(["maxio:us:acme", "calls", "7"]) == "26f5e8e9e40235563629b81a9efec12e2a95bc950cadcf26e372f812226e82ae"
    )


def test_parts_do_not_run_into_each_other():
    """Subscription 1 component 23 is not subscription 12 component 3."""
    assert identity(["1", "23"]) != identity(["12", "3"])
    assert identity(["1", ""]) != identity(["", "1"])


def test_a_part_cannot_fake_the_separator():
    """An account with a control character is refused rather than billed as somebody else."""
    with pytest.raises(ValueError, match=r"U\+001F"):
        identity(["a\x1fb"])


def test_each_revision_has_its_own_token_that_fits_everywhere():
    """A correction never travels under the token of what it corrects, and every site takes the token's length."""
    tokens = {uniqueness_token("f" * 64, revision) for revision in range(20)}
    assert len(tokens) == 20
    assert {len(token) for token in tokens} == {64}
    assert all(token.isalnum() for token in tokens)
