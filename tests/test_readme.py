from support.readme import README, with_table


def test_the_settings_table_is_current() -> None:
    """`make readme` writes it."""
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text)
