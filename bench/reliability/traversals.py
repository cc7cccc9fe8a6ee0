"""Texts that would be paths: what somebody sends in the place of an id who wants another file than the server's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

DEPTHS = range(1, 7)
TARGETS = ("canary.txt", "canary/canary.nii.gz", "canary-new", "etc/passwd")
ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "percent": lambda text: quote(text, safe="").replace(".", "%2e"),
    "dots only": lambda text: text.replace(".", "%2E"),
    "slashes only": lambda text: text.replace("/", "%2f"),
    "percent twice": lambda text: quote(quote(text, safe="").replace(".", "%2e"), safe=""),
    "backslashes": lambda text: text.replace("/", "\\"),
    "overlong UTF-8": lambda text: text.replace("/", "%c0%af"),
    "doubled": lambda text: text.replace("../", "....//"),
    "semicolons": lambda text: text.replace("../", "..;/"),
    "division slashes": lambda text: text.replace("/", "\u2215"),
    "full width": lambda text: text.replace(".", "\uff0e").replace("/", "\uff0f"),
    "one dot leaders": lambda text: text.replace(".", "\u2024"),
    "from a known image": lambda text: f"case01/{text}",
    "from the labels": lambda text: f"labels/final/{text}",
    "NUL and an ending": lambda text: f"{text}\0.nii.gz",
}
NAMES = (
    *(".", "..", "...", "....", "", " ", "/", "//", "\\", "-", "~", "~root", "~/canary.txt", "~root/.ssh/id_rsa"),
    *("case01/", "case01/.", "case01/..", "./case01", "case01.", "case01 ", "case01\n", "case01\r\n", "case01\t"),
    *("case01\0", "case01%00", "case01;", "case01#", "case01?x", "case01::$DATA", "CASE01", "case01.nii.gz"),
    *("*", "?", "case0*", "[a-z]*", "**/*", "{case01,canary}", "$HOME", "$HOME/canary.txt", "%HOME%", "${HOME}"),
    *("$(touch canary-new)", "`touch canary-new`", "; touch canary-new", "| touch canary-new", "&& touch canary-new"),
    *("C:\\canary.txt", "C:canary.txt", "c:/canary.txt", "\\\\server\\share\\canary.txt", "\\\\?\\C:\\canary.txt"),
    *("CON", "NUL", "COM1", "aux.nii.gz", "LPT1.txt"),
    *("file:///etc/passwd", "http://127.0.0.1:1/canary", "ftp://x/canary", "data:,canary", "jar:file:///x!/y"),
    *("/etc/passwd", "/etc/hostname", "/proc/self/environ", "/proc/self/cwd/canary.txt", "/proc/self/root/etc/passwd"),
    *("/dev/null", "/dev/fd/0", "link-to-canary/canary.txt", "link-to-canary", "../studies/link-to-canary/canary.txt"),
    *("models/tiny/v1/version.json", "../home/logins.json", "../home/audit", "users.json", "datastore_v2.json"),
    *(
        "__class__",
        "{0}",
        "{{7*7}}",
        "%s%s%s",
        "%n",
        "' OR 1=1 --",
        '"',
        "<canary>",
        "\u202etxt.yranac",
        "\ufeffcase01",
    ),
    *("a" * 256, "a" * 5000, "../" * 500 + "canary.txt", "./" * 2000 + "case01", "/" * 3000, "%2e%2e%2f" * 300),
)


def traversals(canaries: Path) -> list[str]:
    """Return every text once; some name the folder of canaries by its absolute path."""
    climbs = [encode("../" * depth + target) for encode in ENCODINGS.values() for depth in DEPTHS for target in TARGETS]
    here = [
        form.format(path=canaries)
        for form in (
            *("{path}/canary.txt", "/{path}/canary.txt", "{path}/canary", "file://{path}/canary.txt"),
            *("{path}/canary/canary.nii.gz", "{path}/canary-new", "{path}/canary-new.nii.gz", "{path}/canary.txt\0"),
            *("{path}//canary.txt", "{path}/./canary.txt", "{path}/canary/../canary.txt", "{path}/canary.txt/"),
        )
    ]
    return list(dict.fromkeys([*climbs, *here, *NAMES]))
