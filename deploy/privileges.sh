#!/bin/sh
# What root does for the agent, whose service is no root: of the kernel's settings, the few that a run may ask for are opened to the agent's
# group, and the power mode is set by NVIDIA's nvpmodel, which wants root. Called by the service's units; deploy/install.sh closes again.
#   privileges.sh open         governor, lower limits of clocks
#   privileges.sh close        these, and the processor's energy counters, are root's alone again
#   privileges.sh power-mode   sets the mode whose number is on standard input, at most four digits; what nvpmodel says goes out
set -eu

group=joulemark

settings() {
    for file in /sys/devices/system/cpu/cpufreq/policy*/scaling_governor /sys/devices/system/cpu/cpufreq/policy*/scaling_min_freq \
        /sys/class/devfreq/*/min_freq; do
        if [ -e "$file" ]; then printf '%s\n' "$file"; fi
    done
}

open_settings() {
    settings | while IFS= read -r file; do
        chgrp "$group" "$file" && chmod g+w "$file"
    done
}

close_all() {
    settings | while IFS= read -r file; do
        chgrp root "$file" && chmod g-w "$file"
    done
    for counter in /sys/class/powercap/*/energy_uj; do
        if [ -e "$counter" ]; then
            chgrp root "$counter" && chmod 0400 "$counter"
        fi
    done
}

# Whoever asks may be anybody in the group: a number and nothing else. nvpmodel asks whether to restart; nobody answers, so it does not.
set_power_mode() {
    number=$(head -c 6)
    case $number in
        '' | *[!0-9]* | ?????*)
            echo "no number of a power mode"
            exit 2
            ;;
    esac
    status=0
    nvpmodel -m "$number" </dev/null 2>&1 || status=$?
    # A mode switches cores off and on, and the kernel may make their files anew.
    open_settings
    exit "$status"
}

case ${1-} in
    open) open_settings ;;
    close) close_all ;;
    power-mode) set_power_mode ;;
    *)
        echo "usage: privileges.sh open | close | power-mode" >&2
        exit 2
        ;;
esac
