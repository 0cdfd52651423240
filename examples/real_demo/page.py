"""Answers as a page of Markdown."""


def as_page(results):
    """Every answer side by side, as Markdown."""

    def cell(text):
        return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")

    parts = ["# Base and tuned, on rows that no adapter has seen"]
    for task, found in results.items():
        parts += [f"## {task}", "| | base | tuned |\n|---|---:|---:|\n" + "\n".join(
            f"| {name} | {before:.0f} | {found['tuned'][name]:.0f} |" for name, before in found["base"].items()
        )]  # fmt: skip
        parts.append("| prompt | expected | base | tuned |\n|---|---|---|---|\n" + "\n".join(
            "| " + " | ".join(cell(row[key]) for key in ("prompt", "expected", "base", "tuned")) + " |" for row in found["rows"]
        ))  # fmt: skip
    return "\n\n".join(parts) + "\n"
