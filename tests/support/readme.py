"""The settings' table of README.md, generated from the settings themselves: `make readme`."""

import json
from pathlib import Path

from authz_server.settings import ENV_PREFIX, Settings

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- settings:begin (made by `make readme`) -->\n"
END = "<!-- settings:end -->\n"


def settings_table() -> str:
    """The table in Markdown, a row for each setting."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    defaults = Settings.model_construct().shown()
    for name, field in Settings.model_fields.items():
        default, _ = defaults[name]
        if isinstance(default, list):
            default = ",".join(default)
        text = default if isinstance(default, str) else json.dumps(default)
        shown = "" if default in (None, "", {}) else f"`{text}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{ENV_PREFIX}{name.upper()}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """README's text with the table as it must be."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{settings_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
