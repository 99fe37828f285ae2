# Runs application scripts (CONTRACT.md section 5). Sourced by ext.

CAP=65536
EACH_S=30

# Names of all applications, shipped and the guest's own, in order.
app_names() {
    for found in "$HERE"/apps/[0-9][0-9]-* "$USER_APPS"/[0-9][0-9]-*; do
        [ -e "$found/run" ] || continue
        case ${found##*/} in *[!A-Za-z0-9._-]*) ;; *) echo "${found##*/}" ;; esac
    done | sort -u
}

# Sets $folder: the guest's own application takes the place of the shipped one of its name.
app_folder() {
    folder=$HERE/apps/$1
    [ ! -e "$USER_APPS/$1/run" ] || folder=$USER_APPS/$1
}

# All pre scripts, by number; sets $failed. After a failure no later number begins, and what has begun is undone at once.
pre_scripts() {
    failed= number=
    clock
    end=$((now + limit_s))
    all=$(app_names)
    for name in $all; do
        if [ "${name%%-*}" != "$number" ]; then
            wait_for_scripts pre
            number=${name%%-*}
        fi
        if [ -n "$failed" ]; then
            result "$name" pre skipped 0 0 0 "another one had failed"
            continue
        fi
        begin "$name" pre
    done
    wait_for_scripts pre
    [ -z "$failed" ] || post_scripts
    clock
    # A holder is this very process: its number and when it began.
    for name in $(cat "$JOB/started"); do
        pid=$(cat "$JOB/state/$name/holder" 2>/dev/null) || continue
        echo "$pid $(began "$pid")" >"$JOB/state/$name.holder"
    done
}

# Post scripts of all that have begun and are not undone yet, backwards.
post_scripts() {
    number=
    backwards=
    for name in $(cat "$JOB/started"); do backwards="$name $backwards"; done
    : >"$JOB/started"
    clock
    end=$((now + EACH_S * 4))
    for name in $backwards; do
        if [ "${name%%-*}" != "$number" ]; then
            wait_for_scripts post
            number=${name%%-*}
        fi
        begin "$name" post
    done
    wait_for_scripts post
}

# Starts the script of $1 for phase $2 in the background.
begin() {
    (one "$1" "$2") </dev/null >/dev/null 2>&1 &
    running="${running:-} $!:$1"
}

# Waits for what was begun; notes what has to be undone, and failures in $failed.
wait_for_scripts() {
    for entry in ${running:-}; do
        wait "${entry%%:*}"
        name_of=${entry#*:}
        [ "$1" = pre ] || continue
        case $(cat "$JOB/result/$name_of.pre" 2>/dev/null) in
            *'"outcome": "not_applicable"'* | *'"outcome": "refused"'*) ;;
            *) echo "$name_of" >>"$JOB/started" ;;
        esac
        case $(cat "$JOB/result/$name_of.pre" 2>/dev/null) in
            *'"outcome": "ok"'* | *'"outcome": "not_applicable"'*) ;;
            *) failed=yes; : >"$JOB/failed" ;;
        esac
    done
    running=
}

# One script with its tries, in a process of its own.
one() {
    name=$1 phase=$2
    app_folder "$name"
    clock
    since=$ticks
    exec 8<"$folder/run" || { result "$name" "$phase" refused 0 0 0 "run cannot be opened"; return; }
    why=$(untrusted "$folder")
    [ -z "$why" ] || { result "$name" "$phase" refused 0 0 0 "$why"; return; }
    mkdir -p "$JOB/state/$name" "$JOB/records/$name"
    log=$JOB/log/$name.$phase
    tries=0
    while :; do
        tries=$((tries + 1))
        clock
        seconds=$((end - now))
        [ "$seconds" -lt $EACH_S ] || seconds=$EACH_S
        [ "$seconds" -gt 0 ] || { code=60; : >"$log.late"; break; }
        try
        [ "$code" = 75 ] && [ "$tries" -lt 3 ] || break
        sleep 1
    done
    clock
    outcome=failed
    case $code in 0) outcome=ok ;; 3) outcome=not_applicable ;; esac
    [ ! -e "$log.late" ] || outcome=timeout
    detail=
    [ "$outcome" != failed ] || detail=$(tail -n 1 "$log.log" 2>/dev/null | head -c 300 | tr -cd '\40-\176')
    result "$name" "$phase" "$outcome" "$code" $((ticks - since)) "$tries" "$detail"
}

# Runs the script behind descriptor 8 once, in a session of its own; sets $code.
try() {
    [ -p "$log.pipe" ] || mkfifo "$log.pipe"
    # Reads on after its share is full, and after the script has ended: a daemon must not be stopped by a full pipe.
    { head -c $CAP >>"$log.log"; exec cat; } <"$log.pipe" >/dev/null 2>&1 &
    reader=$!
    word=
    for option in $app_options; do
        case $option in "${name#??-}="*) word=${option#*=} ;; esac
    done
    so_far=ok
    [ -z "${failed:-}" ] || so_far=failed
    env -i PATH="$PATH" LC_ALL=C HOME=/root STILLFRAME_JOB="$job" STILLFRAME_UUID="$uuid" STILLFRAME_PHASE="$phase" \
        STILLFRAME_GOAL="$goal" STILLFRAME_APP_DIR="$folder" STILLFRAME_OPTION="$word" STILLFRAME_DEADLINE="$seconds" \
        STILLFRAME_HOLD=$((limit_s + freeze_s + 10)) STILLFRAME_MOUNTS="$JOB/mounts" STILLFRAME_STATE="$JOB/state/$name" \
        STILLFRAME_RECORDS="$JOB/records/$name" STILLFRAME_RESULT="$so_far" \
        setsid /proc/self/fd/8 "$phase" >"$log.pipe" 2>&1 </dev/null &
    script=$!
    (
        trap 'kill "$nap" 2>/dev/null; exit' TERM
        sleep "$seconds" & nap=$!
        wait "$nap"
        : >"$log.late"
        kill -TERM -- "-$script"
        sleep 5 & nap=$!
        wait "$nap"
        kill -KILL -- "-$script"
    ) >/dev/null 2>&1 </dev/null 8<&- &
    timer=$!
    wait "$script"
    code=$?
    kill "$timer" 2>/dev/null
    # What the script itself has said is in the log by now; a daemon of its own may go on for ever.
    patience=20
    while kill -0 "$reader" 2>/dev/null && [ $((patience -= 1)) -gt 0 ]; do sleep 0.02; done
}

# Says why the file behind descriptor 8, or a folder above it, could have been written by somebody else than root.
untrusted() {
    real=$(cd "$1" && pwd -P) || { echo "its folder is gone"; return; }
    [ ! -L "$real/run" ] || { echo "run is a link"; return; }
    above=/
    rest=${real#/}
    path=
    while [ -n "$rest" ]; do
        path=$path/${rest%%/*}
        above="$above $path"
        case $rest in */*) rest=${rest#*/} ;; *) rest= ;; esac
    done
    # shellcheck disable=SC2086 # no name here has a space: see app_names
    stat -L -c '%u %a %n' /proc/self/fd/8 $above | while read -r owner mode path; do
        [ "$owner" = 0 ] || { echo "$path belongs to user $owner, not to root"; break; }
        case $mode in
            *[2367]? | *[2367]) echo "$path can be written by others (mode $mode)"; break ;;
            [2467]???) [ "$path" != /proc/self/fd/8 ] || { echo "run has mode $mode"; break; } ;;
        esac
    done
    [ -f /proc/self/fd/8 ] || echo "run is no regular file"
}

# Notes how a run ended: name, phase, outcome, code, hundredths of a second, tries, detail.
result() {
    json "$7"
    printf '{"name": "%s", "phase": "%s", "outcome": "%s", "code": %d, "seconds": %d.%02d, "tries": %d, "detail": %s}' \
        "$1" "$2" "$3" "$4" $(($5 / 100)) $(($5 % 100)) "$6" "$quoted" >"$JOB/result/$1.$2"
}

# Prints the results of the given phases.
results() {
    comma=
    for phase in "$@"; do
        for file in "$JOB"/result/*."$phase"; do
            [ -e "$file" ] || continue
            read -r line <"$file" || :
            printf '%s%s' "$comma" "$line"
            comma=', '
        done
    done
}

# When a process began, in ticks since boot: a number that was used again is another process.
began() {
    read -r line <"/proc/$1/stat" 2>/dev/null || return 1
    # shellcheck disable=SC2086
    set -- ${line##*) }
    echo "${20}"
}

# Puts the names of applications that are no longer held into $lost.
check_holders() {
    for file in "$JOB"/state/*.holder; do
        [ -e "$file" ] || continue
        read -r pid start <"$file"
        if [ "$(began "$pid")" != "$start" ]; then
            name=${file##*/}
            lost="$lost${lost:+, }\"${name%.holder}\""
        fi
    done
}

# Prints what scripts left to be kept with the point.
records() {
    comma=
    for kept in "$JOB"/records/*/*; do
        [ -f "$kept" ] && [ ! -L "$kept" ] || continue
        from=${kept#"$JOB/records/"}
        json "$from"
        printf '%s%s: "%s"' "$comma" "$quoted" "$(head -c $CAP "$kept" | base64 | tr -d '\n')"
        comma=', '
    done
}
