#!/bin/sh
# Runs on a flashed card at every boot until it has come to its end once: makes the user, installs the agent from the folder that this file
# lies in, and takes away that folder's secrets and parcels. Each step may be cut off by a power cut and done again. What it says is also in
# first_boot.log beside it, which any computer can read on a card's boot partition.
set -eu

folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
boot=$(dirname -- "$folder")
unit=joulemark-first-boot.service
log=$folder/first_boot.log

say() { printf '%s\n' "$*"; }

install_agent() {
    if [ -e "$folder/settings.sh" ]; then sh -eu "$folder/settings.sh"; fi
    set --
    while IFS= read -r word; do set -- "$@" "$word"; done <"$folder/install.options"
    if [ -e "$folder/enrol.key" ]; then set -- "$@" --enrol-key-file "$folder/enrol.key"; fi
    sh "$folder/install.sh" "$@"
}

# cloud-init would ask for its seed again at the next boot, and undo the board's settings without it.
forget_seed() {
    if [ ! -e "$folder/cloud-init" ]; then return; fi
    : >/etc/cloud/cloud-init.disabled
    sync
    while IFS= read -r name; do rm -f "$boot$name"; done <"$folder/cloud-init"
    rm -f "$folder/cloud-init"
}

first_boot() {
    say "first boot: $(date -u +%Y-%m-%dT%H:%M:%SZ) by this board's clock"
    # What the system made of its settings is on the disk before anything builds on it.
    sync
    if [ -e "$folder/install.options" ]; then
        install_agent
        sync
        # From here on it counts as installed: again would be without the key.
        rm -f "$folder/install.options"
        sync
    fi
    forget_seed
    rm -f "$folder/enrol.key" "$folder/settings.sh" "$folder/install.sh" "$folder/$unit" "$folder/release.tar.gz"
    rm -f "/etc/systemd/system/multi-user.target.wants/$unit" "/etc/systemd/system/$unit" "/run/systemd/system/$unit"
    say "done: the agent is installed; its last words:"
    journalctl --no-pager --output cat --lines 10 --unit joulemark-agent 2>/dev/null || true
    rm -f "$folder/first_boot.sh"
    sync
}

# Said at once to the journal and to the log, which may be full or read-only: that must not stop the installation. `set -e` means nothing
# within a list of && or ||, so there is none around it.
result=$(mktemp)
set +e
{
    (
        set -e
        first_boot
    ) 2>&1
    printf '%s' "$?" >"$result"
} | tee -a "$log"
status=$(cat "$result")
rm -f "$result"
if [ "$status" -ne 0 ]; then say "it did not come to its end (status $status): the next boot tries again" | tee -a "$log"; fi
exit "$status"
