# Debian packages: what is installed to build with, and what is taken apart. Sourced.

say() { echo "$*" >&2; }
die() { say "error: $*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then DEBIAN_FRONTEND=noninteractive "$@" >&2
    elif command -v sudo >/dev/null; then sudo DEBIAN_FRONTEND=noninteractive "$@" >&2
    else die "this needs root or sudo: $*"
    fi
}

update_lists() { as_root apt-get update -q; }

# require PACKAGE...: those that are missing
require() {
    local package missing=()
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    local command=(apt-get install -q -y --no-install-recommends "${missing[@]}")
    as_root "${command[@]}" || { update_lists && as_root "${command[@]}"; }
}

# candidate PACKAGE: prints the version that would be downloaded
candidate() {
    local version
    version=$(LC_ALL=C apt-cache policy "$1" | sed -n 's/^  Candidate: //p')
    if [ -z "$version" ] || [ "$version" = "(none)" ]; then
        update_lists
        version=$(LC_ALL=C apt-cache policy "$1" | sed -n 's/^  Candidate: //p')
    fi
    [ -n "$version" ] && [ "$version" != "(none)" ] || die "apt knows no package $1 (Debian 12 or newer has it)"
    echo "$version"
}

# unpack PACKAGE DIRECTORY: downloads the candidate and takes its files apart there
unpack() {
    mkdir -p "$2"
    (cd "$2" && { apt-get download -q "$1" || { update_lists && apt-get download -q "$1"; }; }) >&2
    dpkg -x "$2/$1"_*.deb "$2"
    rm "$2/$1"_*.deb
}
