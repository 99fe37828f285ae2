# Putting versions in place (CONTRACT.md, section 2). A version is complete before its name appears, and the one in
# force changes by one rename: whatever is interrupted, there is always one that works, or none.

is_version() {
    case $1 in '' | .* | current | previous | */*) return 1 ;; esac
}

refuse_under_lease() {
    if read_lease && lease_holds; then
        fail 11 "job $held_job holds this guest for another $left_s s"
    fi
}

verb_install() {
    case $to_root in
        /opt/stillframe | /run/stillframe-ext) ;;
        *) fail 30 "--root: $to_root is no place for the extension" ;;
    esac
    is_version "$to_version" || fail 30 "--version: $to_version is no version"
    case $version in .stage-*) ;; *) fail 30 "$here is no stage" ;; esac
    # A root that is a link itself is followed, but a stage elsewhere could not be renamed to it.
    real=$(cd -P "$to_root" 2>/dev/null && echo "$PWD")
    [ "$real" = "$root" ] || fail 30 "the stage $here is not in $to_root"
    refuse_under_lease
    echo "$serial" >"$here/serial" && chmod 0755 "$here" || fail 20 "$here cannot be written"
    if [ -e "$root/$to_version" ]; then
        # The same version is the same content, but that may have been damaged.
        old=$root/.stage-old-$$
        mv "$root/$to_version" "$old" || fail 20 "$root/$to_version cannot be moved away"
    fi
    mv "$here" "$root/$to_version" || fail 20 "$here cannot be moved to $root/$to_version"
    [ -z "$old" ] || rm -rf "$old"
    done_with
}

# Makes the link $1 in $root point at $2, replacing it by rename. An old busybox cannot rename onto a link; there the
# link is absent for a moment.
point() {
    ln -sfn "$2" "$root/.new-$1" && mv -fT "$root/.new-$1" "$root/$1" 2>/dev/null && return
    rm -f "$root/.new-$1"
    ln -sfn "$2" "$root/$1"
}

verb_enable() {
    is_version "$version" || fail 30 "$here is no installed version"
    refuse_under_lease
    state_of "$root"
    read_machine
    if [ -n "$uuid" ] && [ "$uuid" != "$machine" ]; then
        forget_machine
    fi
    before=
    [ -h "$root/current" ] && before=$(readlink "$root/current")
    # On disk before it is in force: after a power failure the link must not lead to empty files.
    sync -f "$here" 2>/dev/null || sync
    if [ -n "$before" ] && [ "$before" != "$version" ] && [ -f "$root/$before/ext" ]; then
        point previous "$before" || fail 20 "$root/previous cannot be written"
    fi
    point current "$version" || fail 20 "$root/current cannot be written"
    remove_others
    done_with
}

# Removes all versions but the one in force and the one before, and stages that somebody left behind. A link that
# leads nowhere or to the version in force is no way back.
remove_others() {
    keep=
    [ -h "$root/previous" ] && keep=$(readlink "$root/previous")
    if [ "$keep" = "$version" ] || [ ! -f "$root/$keep/ext" ]; then
        rm -f "$root/previous"
        keep=
    fi
    unwanted=
    set +f
    for other in "$root"/* "$root"/.stage-*; do
        set -f
        case ${other##*/} in current | previous | "$version" | '*' | '.stage-*') continue ;; esac
        [ "${other##*/}" = "$keep" ] || rm -rf "$other"
    done
    set -f
}

# What was known of another machine: this is a copy of it, or was restored from it. Its lease is ended properly, since
# its watchdog lives if it is in memory.
forget_machine() {
    if read_lease; then
        /bin/sh "$here/ext" resume --job "$held_job" >/dev/null 2>&1 </dev/null
    fi
    [ -z "$machine" ] || rm -rf /var/log/stillframe "$state" "$mem/last"
    if mkdir -p "$state" /var/log/stillframe && echo "$uuid" >"$state/machine"; then
        machine=$uuid
    else
        case $root in /run/*) ;; *) fail 20 "$state cannot be written" ;; esac
        mkdir -p "$state" && echo "$uuid" >"$state/machine" && machine=$uuid
    fi 2>/dev/null
}

verb_uninstall() {
    refuse_under_lease
    found=
    for place in /opt/stillframe /run/stillframe-ext; do
        set +f
        for one in "$place"/*; do
            set -f
            [ -e "$one" ] || [ -h "$one" ] && found=$place
        done
        set -f
    done
    [ -n "$found" ] || done_with '' 3
    end_watchdog
    # Links first: from then on nothing is in force.
    rm -f /opt/stillframe/current /run/stillframe-ext/current
    rm -rf /opt/stillframe /run/stillframe-ext /var/lib/stillframe "$mem"
    for place in /opt/stillframe /run/stillframe-ext; do
        [ ! -e "$place/current" ] || fail 20 "$place cannot be removed"
    done
    done_with
}
