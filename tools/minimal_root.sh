#!/usr/bin/env bash
# First contact, tried: `make demo` and `make test` in a Debian that has python3 and make, 2 GiB of /dev/shm, and no more.
#
#     make roots                         bookworm (Python 3.11) and trixie (3.13), each as root and as somebody
#     make roots RUNS=trixie:somebody    one of them
#
# What is tried is the last commit, in a fresh copy of what debootstrap makes; the mounts and processes of a run are in
# namespaces of its own, which end with it. pip finds in there what it finds here: what it is told, and the folders that this names, are carried along. Where the tree refuses to go on before root has run a command, exactly the command that it
# says is run, and it is asked again. Each run's output is in build/roots/RUN.log; what passed is printed.
# It needs root, debootstrap, and 10 GB of disk.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
roots="$PWD/build/roots"
mirror="${MIRROR:-http://deb.debian.org/debian}"
person=somebody # any user but root

[ "$(id -u)" -eq 0 ] || { echo "minimal roots: be root, to make file systems and mount them" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "minimal roots: debootstrap is missing: apt-get install debootstrap" >&2; exit 1; }

# A suite's file system, made once.
base() {
    [ -e "$roots/$1.made" ] && return
    echo "making $roots/$1 with debootstrap"
    rm -rf --one-file-system "${roots:?}/$1"
    debootstrap --variant=minbase --include=python3,make "$1" "$roots/$1" "$mirror" >"$roots/$1.log" 2>&1
    touch "$roots/$1.made"
}

# What pip is told on this host, by variables and files, as one file.
pip_configuration() {
    echo "[global]"
    python3 -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'\$/\2 = \3/p" | sort | awk '!seen[$1]++'
}

# The files and folders that it names. An index has its files beside it.
pip_paths() {
    pip_configuration | grep -oE '/[^[:space:]:;,]+' | xargs -r realpath -ms | sed 's#/simple$##' | sort -u |
        while read -r path; do [ "$path" = / ] || ! [ -e "$path" ] || echo "$path"; done
}

# A fresh copy for one run, with the last commit in it.
lay() { # ROOT SUITE USER
    local home path
    rm -rf --one-file-system "$1"
    cp -a "$roots/$2" "$1"
    [ "$3" = root ] || chroot "$1" useradd --create-home "$3"
    home=$(chroot "$1" sh -c "echo ~$3")
    mkdir -p "$1$home/hotspare" "$1/var/cache/pip" "$roots/pip-$3"
    git archive HEAD | tar -x -C "$1$home/hotspare"
    for path in $(pip_paths) /etc/resolv.conf /etc/hosts; do
        if [ -d "$path" ]; then mkdir -p "$1$path"; else install -D -m 644 "$path" "$1$path"; fi
    done
    # The package ca-certificates, which others bring, writes over a file of that name.
    pip_configuration | sed "s#= .*/ca-certificates.crt#= /etc/pip.crt#" >"$1/etc/pip.conf"
    [ ! -e "$1/etc/ssl/certs/ca-certificates.crt" ] || mv "$1/etc/ssl/certs/ca-certificates.crt" "$1/etc/pip.crt"
    chroot "$1" chown -R "$3:" "$home/hotspare"
    chown "$(chroot "$1" id -u "$3")" "$roots/pip-$3"
}

# A command in there, in namespaces of its own.
inside() { # ROOT USER COMMAND
    folders=$(pip_paths | while read -r path; do [ ! -d "$path" ] || echo "$path"; done) \
    unshare --mount --pid --ipc --fork --kill-child bash -euc '
        root=$1 user=$2
        mount --make-rprivate /
        mount --bind "$root" "$root" # or "/" in there would be no mount, and no test could have mounts of its own
        mount -t proc proc "$root/proc"
        mount -t sysfs -o ro sysfs "$root/sys"
        mount -t tmpfs -o size=2g,mode=1777 tmpfs "$root/dev/shm"
        mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
        ln -sf pts/ptmx "$root/dev/ptmx"
        mount --bind "$4/pip-$user" "$root/var/cache/pip"
        for folder in $folders; do mount --bind "$folder" "$root$folder"; done
        home=$(chroot "$root" sh -c "echo ~$user")
        exec chroot "$root" setpriv --reuid "$user" --regid "$user" --init-groups env -i -C "$home" \
            HOME="$home" USER="$user" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-}" PIP_CACHE_DIR=/var/cache/pip sh -c "$3"
    ' _ "$1" "$2" "$3" "$roots" </dev/null
}

# One command of the README, in one run. Where it asks for what only root can do, root does what it says.
try() { # RUN USER COMMAND
    local root="$roots/run-$1" log="$roots/$1.log" mark asked status=0
    mark=$(wc -l <"$log")
    inside "$root" "$2" "$3" >>"$log" 2>&1 || status=$?
    asked=$(tail -n "+$((mark + 1))" "$log" | sed -n 's/^ *sudo //p' | sed 's/ && sudo / \&\& /g')
    if [ "$status" -ne 0 ] && [ -n "$asked" ]; then
        echo "$1: $3 asks for: $asked"
        inside "$root" root "export DEBIAN_FRONTEND=noninteractive; $asked" >>"$log" 2>&1
        status=0
        inside "$root" "$2" "$3" >>"$log" 2>&1 || status=$?
    fi
    [ "$status" -eq 0 ] || failed="$failed $1"
    echo "$1: $3 ended with $status: $(grep -E "^[0-9]+ (comparisons|passed|failed)" "$log" | tail -n 1)"
}

failed=
mkdir -p "$roots"
for run in "${@:-bookworm:root bookworm:somebody trixie:root trixie:somebody}"; do
    for one in $run; do
        suite=${one%%:*} user=${one#*:} name=${one/:/-}
        base "$suite"
        lay "$roots/run-$name" "$suite" "$user"
        : >"$roots/$name.log"
        try "$name" "$user" "make -C hotspare demo"
        try "$name" "$user" "make -C hotspare test && ls -A /dev/shm | wc -l | grep -qx 0"
        rm -rf --one-file-system "$roots/run-$name"
    done
done
[ -z "$failed" ] || { echo "failed in$failed: see $roots" >&2; exit 1; }
