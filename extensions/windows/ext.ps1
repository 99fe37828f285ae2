# The extension in a Windows guest (CONTRACT.md, sections 3 and 7): one verb in, one line of JSON and an exit code out.
#
# Windows freezes by itself: VSS asks its writers, holds writes, and lets go after 10 seconds whoever dies. So nothing is
# frozen or watched here. This looks whether VSS can work at all, sees that a backup leaves the chains of backups alone
# that a database makes itself (VssOption), and tells afterwards what the writers made of it.
#
# Kept small on purpose: no machine of ours can run it. Windows PowerShell 5.1, no modules. Nothing is written outside
# the two folders below, but VssOption.
#
#     powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -File ext.ps1 VERB [-Name value]...
#
# There is no param block: options that this version does not know are to be ignored, and PowerShell would give the
# value of one to another parameter.

$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue' # else standard error is filled with progress in XML

if ($ExecutionContext.SessionState.LanguageMode -ne 'FullLanguage') {
    Write-Output '{"verb":"","ok":false,"error":"a policy holds PowerShell in constrained language mode"}'
    exit 10
}

$Contract = 1
$Verb = [string]$args[0]
$Options = @{}
for ($at = 1; $at + 1 -lt $args.Count; $at += 2) {
    $Options[([string]$args[$at]).TrimStart('-')] = [string]$args[$at + 1]
}

$Root = Join-Path $env:ProgramFiles 'Stillframe'
$Data = Join-Path $env:ProgramData 'Stillframe'
$Mine = Split-Path -Leaf $PSScriptRoot
$Vss = 'HKLM:\SYSTEM\CurrentControlSet\Services\VSS'
$Provider = 'HKLM:\SYSTEM\CurrentControlSet\Services\QEMU Guest Agent VSS Provider'
$ProviderId = '{3629d4ed-ee09-4e0e-9a5c-6d8ba2872aef}'
$FullBackup = 1
$CopyBackup = 5
$Disabled = 4

# --- answers ---

function Exit-Verb([int]$Code, [hashtable]$Answer) {
    $Answer['verb'] = $Verb
    $Answer['ok'] = ($Code -eq 0 -or $Code -eq 3)
    $json = ConvertTo-Json -InputObject $Answer -Compress -Depth 5
    # ASCII alone: in the console's code page anything else would no longer be JSON.
    $plain = [regex]::Replace($json, '[^\x20-\x7e]', { param($found) '\u{0:x4}' -f [int][char]$found.Value })
    [Console]::Out.WriteLine($plain)
    exit $Code
}

function Stop-Verb([int]$Code, [string]$Why) {
    Exit-Verb $Code @{ error = $Why }
}

function Get-Option([string]$Name, [string]$Pattern) {
    $value = [string]$Options[$Name]
    if ($value -notmatch $Pattern) { Stop-Verb 30 "option $Name is missing or wrong" }
    return $value
}

# --- files ---

function Read-Text([string]$Path) {
    if ([IO.File]::Exists($Path)) { return [IO.File]::ReadAllText($Path).Trim() }
    return ''
}

# By rename: a machine that stops meanwhile has the old text or the new one, whole.
function Save-Text([string]$Path, [string]$Text) {
    [IO.File]::WriteAllText("$Path.new", $Text)
    if ([IO.File]::Exists($Path)) {
        [IO.File]::Replace("$Path.new", $Path, [NullString]::Value)
    } else {
        [IO.File]::Move("$Path.new", $Path)
    }
}

function Remove-Whole([string]$Path) {
    if (Test-Path -LiteralPath $Path) { Remove-Item -LiteralPath $Path -Recurse -Force }
}

# For SYSTEM and Administrators alone, nothing inherited. Anybody may make folders in ProgramData, so one that is a link,
# or that somebody else has made, is not used.
function New-Data {
    $rules = New-Object System.Security.AccessControl.DirectorySecurity
    $rules.SetSecurityDescriptorSddlForm('O:BAG:BAD:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)')
    [void][IO.Directory]::CreateDirectory($Data, $rules)
    if ([IO.File]::GetAttributes($Data).HasFlag([IO.FileAttributes]::ReparsePoint)) {
        Stop-Verb 30 "$Data is a link"
    }
    $owner = [IO.Directory]::GetAccessControl($Data).GetOwner([Security.Principal.SecurityIdentifier]).Value
    if ($owner -ne 'S-1-5-18' -and $owner -ne 'S-1-5-32-544') {
        Stop-Verb 30 "$Data belongs to $owner, not to SYSTEM or Administrators"
    }
    [IO.Directory]::SetAccessControl($Data, $rules)
}

# --- the lease: `job taken until`, in seconds since the machine's start ---

function Get-Uptime {
    return [long]([Diagnostics.Stopwatch]::GetTimestamp() / [Diagnostics.Stopwatch]::Frequency)
}

function Get-Lease {
    $words = (Read-Text (Join-Path $Data 'lease')).Split(' ')
    if ($words.Count -ne 3) { return $null }
    $now = Get-Uptime
    # Taken in the future: the machine was restarted since.
    if ($now -lt [long]$words[1] -or $now -ge [long]$words[2]) { return $null }
    return @{ job = $words[0]; left_s = ([long]$words[2] - $now) }
}

function Stop-IfHeld([string]$Job) {
    $lease = Get-Lease
    if ($null -ne $lease -and $lease.job -ne $Job) { Stop-Verb 11 "job $($lease.job) holds the guest" }
}

# A clone or a restored machine is not the one that wrote the state.
function Reset-IfAnother([string]$Uuid) {
    New-Data
    $file = Join-Path $Data 'machine'
    if ((Read-Text $file) -eq $Uuid) { return }
    Remove-Whole (Join-Path $Data 'lease')
    Save-Text $file $Uuid
}

# --- VSS ---

# Why VSS cannot freeze this guest through its agent; empty: it can.
function Get-Obstacle {
    if ((Get-Item -LiteralPath $Vss).GetValue('Start') -eq $Disabled) {
        return 'the service Volume Shadow Copy (VSS) is disabled'
    }
    if (-not (Test-Path -LiteralPath (Join-Path $Vss "Providers\$ProviderId")) -or -not (Test-Path -LiteralPath $Provider)) {
        return 'the VSS provider of the QEMU guest agent is not registered: install the guest agent again'
    }
    if ((Get-Item -LiteralPath $Provider).GetValue('Start') -eq $Disabled) {
        return 'the service QEMU Guest Agent VSS Provider is disabled'
    }
    return ''
}

# A full backup tells databases that they have been backed up, and breaks the chain of their own backups. Updates of the
# agent set it back, so this is looked at each time.
function Set-BackupType {
    $wanted = $CopyBackup
    if ($Options['Vss'] -eq 'primary') { $wanted = $FullBackup }
    $found = (Get-Item -LiteralPath $Provider).GetValue('VssOption', $FullBackup)
    if ($found -eq $wanted) { return '' }
    [void](New-ItemProperty -LiteralPath $Provider -Name 'VssOption' -PropertyType DWord -Value $wanted -Force)
    return "VssOption of the guest agent's VSS provider was $found, and was set to $wanted"
}

# --- verbs ---

function Invoke-Probe {
    $why = Get-Obstacle
    if ($why) { Exit-Verb 10 @{ watchdog = $false; detail = $why; apps = @(); error = $why } }
    Exit-Verb 0 @{ watchdog = $true; detail = 'VSS'; apps = @() }
}

function Invoke-Install {
    $target = Join-Path $Root (Get-Option 'Version' '^[0-9A-Za-z][0-9A-Za-z.+]{0,60}$')
    if ((Split-Path -Parent $PSScriptRoot) -ne $Root) { Stop-Verb 30 "$PSScriptRoot is not a folder in $Root" }
    Save-Text (Join-Path $PSScriptRoot 'serial') (Get-Option 'Serial' '^[0-9]{1,16}$')
    if (Test-Path -LiteralPath $target) {
        [IO.Directory]::Move($target, (Join-Path $Root ('.old-' + [Guid]::NewGuid().ToString('N'))))
    }
    [IO.Directory]::Move($PSScriptRoot, $target)
    Exit-Verb 0 @{}
}

function Invoke-Enable {
    Reset-IfAnother (Get-Option 'Uuid' '^[0-9A-Fa-f-]{36}$')
    $current = Read-Text (Join-Path $Root 'current.txt')
    if ($current -and $current -ne $Mine) { Save-Text (Join-Path $Root 'previous.txt') $current }
    Save-Text (Join-Path $Root 'current.txt') $Mine
    $kept = @($Mine, (Read-Text (Join-Path $Root 'previous.txt')))
    foreach ($folder in [IO.Directory]::GetDirectories($Root)) {
        if ($kept -notcontains (Split-Path -Leaf $folder)) { Remove-Whole $folder }
    }
    Exit-Verb 0 @{}
}

function Invoke-Uninstall {
    Stop-IfHeld ''
    Remove-Whole $Root
    Remove-Whole $Data
    Exit-Verb 0 @{}
}

function Invoke-Status {
    Reset-IfAnother (Get-Option 'Uuid' '^[0-9A-Fa-f-]{36}$')
    $answer = @{
        contract = $Contract
        version = $Mine
        serial = [long](Read-Text (Join-Path $PSScriptRoot 'serial'))
        machine = Read-Text (Join-Path $Data 'machine')
        root = $Root
        transient = $false
        previous = Read-Text (Join-Path $Root 'previous.txt')
    }
    $lease = Get-Lease
    if ($null -ne $lease) { $answer['lease'] = $lease }
    Exit-Verb 0 $answer
}

function Invoke-Quiesce {
    $job = Get-Option 'Job' '^[0-9A-Za-z][0-9A-Za-z._-]{0,63}$'
    $seconds = [long](Get-Option 'FreezeS' '^[0-9]{1,5}$') + [long](Get-Option 'LimitS' '^[0-9]{1,5}$')
    Reset-IfAnother (Get-Option 'Uuid' '^[0-9A-Fa-f-]{36}$')
    Stop-IfHeld $job
    $why = Get-Obstacle
    if ($why) { Exit-Verb 0 @{ watchdog = $false; watchdog_detail = $why } }
    $now = Get-Uptime
    Save-Text (Join-Path $Data 'lease') "$job $now $($now + $seconds)"
    $note = Set-BackupType
    $notes = @()
    if ($note) { $notes = @($note) }
    Exit-Verb 0 @{ watchdog = $true; watchdog_detail = 'VSS lets go after 10 s by itself'; notes = $notes }
}

function Invoke-Resume {
    $job = Get-Option 'Job' '^[0-9A-Za-z][0-9A-Za-z._-]{0,63}$'
    $lease = Get-Lease
    $watchdog = 'absent'
    if ($null -ne $lease -and $lease.job -eq $job) {
        Remove-Whole (Join-Path $Data 'lease')
        $watchdog = 'silent'
    }
    # No redirection of its standard error: PowerShell would take a line of it for a failure.
    $printed = (& (Join-Path $env:SystemRoot 'System32\vssadmin.exe') 'list' 'writers') -join "`n"
    $writers = [Convert]::ToBase64String([Text.Encoding]::UTF8.GetBytes($printed))
    Exit-Verb 0 @{ watchdog = $watchdog; writers = $writers }
}

try {
    $who = [Security.Principal.WindowsPrincipal][Security.Principal.WindowsIdentity]::GetCurrent()
    if (-not $who.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)) {
        Stop-Verb 30 'neither SYSTEM nor an administrator runs this'
    }
    switch ($Verb) {
        'probe' { Invoke-Probe }
        'install' { Invoke-Install }
        'enable' { Invoke-Enable }
        'uninstall' { Invoke-Uninstall }
        'status' { Invoke-Status }
        'quiesce' { Invoke-Quiesce }
        'resume' { Invoke-Resume }
        default { Stop-Verb 30 "there is no verb '$Verb'" }
    }
} catch {
    Stop-Verb 20 "$Verb failed: $($_.Exception.Message)"
}
