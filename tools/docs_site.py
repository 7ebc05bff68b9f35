"""Hooks of mkdocs (mkdocs.yml): what the site shows beside docs/, so that each text has one source.

README.md is the site's first page and CONTRIBUTING.md another. The options of every command become a page. A file
outside docs/ that a page links to is copied if it is a picture, and else shown as a page of its own; where the link is
a paragraph, the file stands there too. Links in the Markdown stay those that GitHub follows.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
BROUGHT_IN = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # file of the repository -> page
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".json": "json", ".jsonl": "json", ".sh": "bash", ".toml": "toml", ".yaml": "yaml"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that are not in docs/."""
    sources = [Path(file.abs_src_path) for file in files.documentation_pages()] + [ROOT / name for name in BROUGHT_IN]
    for name, page in BROUGHT_IN.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "options.md", content=options_page()))
    for source in sources:
        for match in LINK.finditer(source.read_text()):
            target = target_of(match[2], source)
            if target is None or (page := page_of(target)) in files.src_uris:
                continue
            if target.suffix in PICTURES:
                files.append(File.generated(config, page, abs_src_path=str(target)))
            else:
                files.append(File.generated(config, page, content=f"# {target.relative_to(ROOT)}\n{shown(target)}"))
    return files


def shown(target: Path) -> str:
    """A file's text as Markdown shows code."""
    return f"\n~~~~{LANGUAGES.get(target.suffix, 'text')}\n{target.read_text()}\n~~~~\n"


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Points links at the site's pages, and puts the empty line before lists that Python's Markdown wants."""
    names = {target: name for name, target in BROUGHT_IN.items()}
    source = ROOT / names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def pointed(match: re.Match[str]) -> str:
        if (target := target_of(match[2], source)) is None:
            return match[0]
        link = os.path.relpath(page_of(target), os.path.dirname(page.file.src_uri) or ".")
        return f"{match[1]}({link}{match[3] or ''})"

    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        starts = re.match(r"(- |\d+\. )", line) and lines and re.match(r"(?!- |\d+\. | |$)", lines[-1])
        if starts and not fenced:
            lines.append("")
        lines.append(line if fenced else LINK.sub(pointed, line))
        alone = None if fenced else LINK.fullmatch(line)
        if alone and (target := target_of(alone[2], source)) and target.suffix in LANGUAGES:
            lines.append(shown(target))
    return "\n".join(lines)


def target_of(link: str, source: Path) -> Path | None:
    """The file of the repository that a link in `source` leads to; None: it leads elsewhere, or nowhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = Path(os.path.normpath(source.parent / link))
    return target if target.is_relative_to(ROOT) and target.is_file() else None


def page_of(target: Path) -> str:
    """The path on the site, as Markdown, of a file of the repository."""
    name = target.relative_to(ROOT).as_posix()
    if name in BROUGHT_IN or name.startswith("docs/"):
        return BROUGHT_IN.get(name, name.removeprefix("docs/"))
    return f"source/{name}" + ("" if target.suffix in PICTURES else ".md")


def options_page() -> str:
    """The options of every command, from its parser."""
    from distzo2.cli.main import COMMANDS, build_parser

    text = ["# Options of every command", "", "What `distzo2 COMMAND --help` prints.", ""]
    text.append("`distzo2 journal show`, `verify` and `diff` are in [The journal](journal.md#looking-at-journals).")
    for command, parser in build_parser()[1].items():
        about, kind, _ = COMMANDS[command]
        if kind is None:
            continue
        required = {field.name for field in fields(kind) if field.default is MISSING}
        text += ["", f"## distzo2 {command}", f"{about[0].upper()}{about[1:]}."]
        for group in parser._action_groups:
            if rows := [action for action in group._group_actions if action.dest != "help"]:
                text += ["", f"**{group.title}**", "", "| option | what |", "| --- | --- |"]
            for action in rows:
                flags = " ".join(filter(None, [", ".join(action.option_strings), action.metavar])) or action.dest
                plain = re.sub(r"([*_\[])", r"\\\1", escape(action.help.replace("%%", "%"), quote=False))
                help_text = ("**required.** " if action.dest in required else "") + plain
                text.append(f"| `{flags}` | {help_text} |")
    return "\n".join(text) + "\n"
