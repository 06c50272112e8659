"""A hook of MkDocs: the pages' links to files of the repository lead to the same files in the site.

The pages are README.md and docs/*.md, and they link to each other, to results, pictures and
sources as one reads them in a checkout. What lies outside docs/ is added to the site, under the
path that it has in the repository; a page that is added brings what it links to.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")  # the target's path; no address, no bare anchor


def in_site(path):
    """Where a file of the repository is in the site."""
    return path.removeprefix("docs/")


def in_repository(src_uri):
    return f"docs/{src_uri}" if (ROOT / "docs" / src_uri).exists() else src_uri


def target_of(link, path):
    """The file of the repository that `path` links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def on_files(files, config):
    def add(path):
        source = str(ROOT / path)
        files.append(File.generated(config, in_site(path), abs_src_path=source))
        pages.append(path)

    pages = [in_repository(file.src_uri) for file in files.documentation_pages()]
    add("README.md")
    for path in pages:  # it grows
        if not path.endswith(".md"):
            continue
        for link in LINK.findall((ROOT / path).read_text()):
            target = target_of(link, path)
            if (ROOT / target).is_file() and not files.get_file_from_path(in_site(target)):
                add(target)
    return files


def on_page_markdown(markdown, page, **_):
    """What is no file stays as it is, and MkDocs reports it."""
    path = in_repository(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def in_page(match):
        target = target_of(match[1], path)
        if not (ROOT / target).is_file():
            return match[1]
        return posixpath.relpath(in_site(target), here or ".")

    return LINK.sub(in_page, markdown)
