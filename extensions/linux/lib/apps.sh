# Which application scripts there are in this guest, and which of them have something to do (CONTRACT.md, section 5).

# Finds all application scripts: sets $count, app_N and folder_N, in the order of names. Those of the guest's
# administrator take the place of ours.
find_apps() {
    count=0
    names=
    own=
    set +f
    for folder in "$here"/apps/* /etc/stillframe/apps/*; do
        set -f
        [ -d "$folder" ] || continue
        app=${folder##*/}
        case $app in
            *[!a-z0-9_-]* | ????????????????????????????????????????????*) ;;
            [0-9][0-9]-[a-z0-9]*)
                case "$names " in *" $app "*) ;; *) names="$names $app" ;; esac
                case $folder in /etc/*) own="$own $app " ;; esac
                continue
                ;;
        esac
        note "$folder is passed over: an application's folder is named like 50-myapp"
    done
    set -f
    [ -z "$own" ] || names=$(printf '%s\n' $names | sort)
    for app in $names; do
        count=$((count + 1))
        eval "app_$count=\$app folder_$count=\$here/apps/\$app"
        case $own in *" $app "*) eval "folder_$count=/etc/stillframe/apps/\$app" ;; esac
    done
}

# Leaves out the scripts whose file `needs` says that nothing of theirs is here: to start one costs five programs.
leave_out_needless() {
    found=$count
    count=0
    number=0
    while [ "$number" -lt "$found" ]; do
        number=$((number + 1))
        load "$number"
        if is_needed "$folder/needs"; then
            count=$((count + 1))
            eval "app_$count=\$app folder_$count=\$folder"
        else
            phase=pre
            describe not_applicable 3 0 0 ''
        fi
    done
}

# Whether one line of the file $1 holds: `file PATH`, or `socket PATTERN` of one that somebody listens at. Without a
# file, or with a line that is unknown, the script is asked itself.
is_needed() {
    [ -f "$1" ] || return 0
    while read -r kind what; do
        case $kind in
            file) [ -e "$what" ] && return 0 ;;
            socket) listens "$what" && return 0 ;;
            *) return 0 ;;
        esac
    done <"$1"
    return 1
}

listens() {
    IFS=$newline
    set -- "$1" $listening
    IFS=$words
    pattern=$1
    shift
    for line; do
        case /${line#* /} in $pattern) return 0 ;; esac
    done
    return 1
}

# Sets $homes to the folders that the scripts need in the job's folder, $numbers, and $list, by which `resume` knows
# them.
name_homes() {
    homes="$dir/out"
    list=
    numbers=
    number=0
    while [ "$number" -lt "$count" ]; do
        number=$((number + 1))
        numbers="$numbers $number"
        load "$number"
        homes="$homes $home/state $home/records"
        list=$list$app\ $folder$newline
    done
}

# Keeps what `resume` must know of the scripts. Fails if that cannot be kept: without it no `post` would be run.
keep_scripts() {
    {
        printf '%s\n' "$uuid" "$goal" "$freeze_s" "$options" >"$dir/facts" &&
            printf %s "$listening" >"$dir/sockets" && mkfifo "$dir/events" && printf %s "$list" >"$dir/apps"
    } 2>/dev/null
}
