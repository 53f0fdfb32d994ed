"""The Python of the README and the pages, as files for the type checker.

    python -m tools.page_examples FOLDER

Blocks that stand at the margin are whole programs; those inside a list are parts of one, and left out.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def programs(text: str) -> list[str]:
    """The Python programs of a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def main(folder: Path) -> None:
    """Write each program into a file named after its page."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, program in enumerate(programs(page.read_text(encoding="utf-8"))):
            name = f"{page.stem.lower().replace('-', '_')}_{number}.py"
            (folder / name).write_text(program, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
