//! What is done to the site, and when.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// Length of what lasts, if none is given.
const DEFAULT_LENGTH: Duration = Duration::from_secs(5);

/// Something done to the site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// SIGKILL to a member's daemon; its host and links stay.
    Kill(u32),
    /// SIGKILL, and the member's links are cut.
    Crash(u32),
    /// SIGSTOP, and SIGCONT after this long.
    Pause(u32, Duration),
    /// Starts a member: one that is down, or (`None`) a new one.
    Join(Option<u32>),
    /// SIGTERM, and the router withdraws the next hop at once.
    Leave(u32),
    /// SIGKILL, and the same member is started again at once.
    Restart(u32),
    /// Every member in turn is stopped and started again, each once the members say that one may go: with raw sockets it leaves and
    /// joins, with XDP it is killed and adopts its tables (docs/operating/upgrade.md).
    Upgrade,
    /// A backend is added to every member's configuration: one that is not in it, or (`None`) a new one.
    AddBackend(Option<u32>),
    /// A backend gets no new flows.
    DrainBackend(u32),
    /// A backend's links are cut: what it serves breaks. Shows that the instrument sees it.
    CrashBackend(u32),
    /// SIGHUP to one member, or to all.
    Reload(Option<u32>),
    /// The router sends all packets by one member, or (`None`) by all again.
    Enter(Option<u32>),
    /// Nothing reaches a member and nothing leaves it for this long; its process runs on.
    Partition(u32, Duration),
    /// A member and the other members do not reach each other for this long; clients and backends reach all of them.
    Split(u32, Duration),
    /// So many of a hundred packets are lost on every member's link, both ways, for this long.
    Loss(u32, Duration),
    /// A member gets weight 0: it gives its flows away and goes on dispatching.
    Drain(u32),
    /// A drained member gets its weight back.
    Undrain(u32),
    /// A backend fails its health check and goes on serving what it has.
    FailBackend(u32),
    /// A backend that failed its health check passes it again.
    MendBackend(u32),
}

/// An action and its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Time since the long-lived connections were all open.
    pub at: Duration,
    /// What is done.
    pub action: Action,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(id) => write!(f, "kill {id}"),
            Self::Crash(id) => write!(f, "crash {id}"),
            Self::Pause(id, length) => write!(f, "pause {id} for {}", humantime::format_duration(*length)),
            Self::Join(Some(id)) => write!(f, "join {id}"),
            Self::Join(None) => write!(f, "join"),
            Self::Leave(id) => write!(f, "leave {id}"),
            Self::Restart(id) => write!(f, "restart {id}"),
            Self::Upgrade => write!(f, "upgrade"),
            Self::AddBackend(Some(id)) => write!(f, "add backend {id}"),
            Self::AddBackend(None) => write!(f, "add a backend"),
            Self::DrainBackend(id) => write!(f, "drain backend {id}"),
            Self::CrashBackend(id) => write!(f, "crash backend {id}"),
            Self::Reload(Some(id)) => write!(f, "reload {id}"),
            Self::Reload(None) => write!(f, "reload all"),
            Self::Enter(Some(id)) => write!(f, "enter by {id}"),
            Self::Enter(None) => write!(f, "enter by all"),
            Self::Partition(id, length) => {
                write!(f, "partition {id} for {}", humantime::format_duration(*length))
            }
            Self::Split(id, length) => write!(f, "split {id} for {}", humantime::format_duration(*length)),
            Self::Loss(share, length) => {
                write!(f, "loss {share} % for {}", humantime::format_duration(*length))
            }
            Self::Drain(id) => write!(f, "drain {id}"),
            Self::Undrain(id) => write!(f, "undrain {id}"),
            Self::FailBackend(id) => write!(f, "fail backend {id}"),
            Self::MendBackend(id) => write!(f, "mend backend {id}"),
        }
    }
}

impl Action {
    /// The kind of change, as reports group them.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Kill(_) => "kill",
            Self::Crash(_) => "crash",
            Self::Pause(..) => "pause",
            Self::Join(_) => "join",
            Self::Leave(_) => "leave",
            Self::Restart(_) => "restart",
            Self::Upgrade => "upgrade",
            Self::AddBackend(_) => "add backend",
            Self::DrainBackend(_) => "drain backend",
            Self::CrashBackend(_) => "crash backend",
            Self::Reload(_) => "reload",
            Self::Enter(_) => "enter",
            Self::Partition(..) => "partition",
            Self::Split(..) => "split",
            Self::Loss(..) => "loss",
            Self::Drain(_) => "drain",
            Self::Undrain(_) => "undrain",
            Self::FailBackend(_) => "fail backend",
            Self::MendBackend(_) => "mend backend",
        }
    }

    /// The kind of a change that is told in words, as [`fmt::Display`] tells it.
    pub fn kind_of(words: &str) -> Option<&'static str> {
        const KINDS: [&str; 19] = [
            "kill",
            "crash backend",
            "crash",
            "pause",
            "join",
            "leave",
            "restart",
            "upgrade",
            "add backend",
            "drain backend",
            "reload",
            "enter",
            "partition",
            "split",
            "loss",
            "drain",
            "undrain",
            "fail backend",
            "mend backend",
        ];
        // "add a backend" is the one whose words are not its kind and a target.
        if words == "add a backend" {
            return Some("add backend");
        }
        KINDS.into_iter().find(|kind| {
            words.strip_prefix(kind).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        })
    }

    /// Whether it takes a member away, brings one, or moves flows between members.
    pub const fn changes_members(&self) -> bool {
        match self {
            Self::Kill(_)
            | Self::Crash(_)
            | Self::Pause(..)
            | Self::Join(_)
            | Self::Leave(_)
            | Self::Restart(_)
            | Self::Upgrade
            | Self::Partition(..)
            | Self::Split(..)
            | Self::Drain(_)
            | Self::Undrain(_) => true,
            Self::AddBackend(_)
            | Self::DrainBackend(_)
            | Self::CrashBackend(_)
            | Self::Reload(_)
            | Self::Enter(_)
            | Self::Loss(..)
            | Self::FailBackend(_)
            | Self::MendBackend(_) => false,
        }
    }
}

/// What the lab does when it is told nothing: first the backends change, so that many connections sit where the consistent table
/// would not put them; then a member dies. A load balancer without state breaks those connections.
pub fn story(members: u32, backends: u32) -> Vec<Event> {
    /// A site that would have none left loses none.
    const LEAST: u32 = 2;
    let at = |seconds, action| Event { at: Duration::from_secs(seconds), action };
    let mut events = vec![at(2, Action::AddBackend(None))];
    if backends >= LEAST {
        events.push(at(5, Action::DrainBackend(1)));
    }
    if members >= LEAST {
        events.push(at(9, Action::Kill(2)));
    }
    events
}

/// Where and when, as on the command line: `2@5s`, `5s` where no target is needed, `2@5s+3s` with a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct When {
    /// The member or backend.
    pub target: Option<u32>,
    /// Time since the long-lived connections were all open.
    pub at: Duration,
    /// How long it lasts.
    pub length: Option<Duration>,
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example =
            "write TARGET@TIME as in 2@5s, TIME alone as in 5s, or TARGET@TIME+LENGTH as in 2@5s+3s";
        let (target, rest) = match text.split_once('@') {
            Some((target, rest)) => {
                let target = target.trim();
                let number = target.parse().map_err(|_| format!("{target:?} is not a number; {example}"))?;
                (Some(number), rest)
            }
            None => (None, text),
        };
        let duration = |text: &str| {
            humantime::parse_duration(text.trim())
                .map_err(|error| format!("{text:?} is not a time ({error}); {example}"))
        };
        let (at, length) = match rest.split_once('+') {
            Some((at, length)) => (duration(at)?, Some(duration(length)?)),
            None => (duration(rest)?, None),
        };
        Ok(Self { target, at, length })
    }
}

/// The events as the command line names them.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ScenarioArgs {
    /// Kill a member's daemon (SIGKILL); its host and links stay.
    #[arg(long, value_name = "ID@TIME")]
    pub kill: Vec<When>,
    /// Kill a member's daemon and cut its links.
    #[arg(long, value_name = "ID@TIME")]
    pub crash: Vec<When>,
    /// Stop a member's daemon (SIGSTOP) for a length of time (5 s if none is given).
    #[arg(long, value_name = "ID@TIME[+LENGTH]")]
    pub pause: Vec<When>,
    /// Start a member that is down, or a new one.
    #[arg(long, value_name = "[ID@]TIME")]
    pub join: Vec<When>,
    /// Have a member leave (SIGTERM).
    #[arg(long, value_name = "ID@TIME")]
    pub leave: Vec<When>,
    /// Kill a member's daemon and start it again at once.
    #[arg(long, value_name = "ID@TIME")]
    pub restart: Vec<When>,
    /// Stop every member and start it again, one after the other, each once the members say that one may go.
    #[arg(long, value_name = "TIME")]
    pub upgrade: Vec<When>,
    /// Add a backend to every member's configuration.
    #[arg(long, value_name = "[ID@]TIME")]
    pub add_backend: Vec<When>,
    /// Drain a backend: its flows stay, new ones go elsewhere.
    #[arg(long, value_name = "ID@TIME")]
    pub drain_backend: Vec<When>,
    /// Cut a backend's links. This breaks connections, and shows that the lab sees it.
    #[arg(long, value_name = "ID@TIME")]
    pub crash_backend: Vec<When>,
    /// Have a member, or all, read its configuration again (SIGHUP).
    #[arg(long, value_name = "[ID@]TIME")]
    pub reload: Vec<When>,
    /// Have the router send all packets by one member, or by all again.
    #[arg(long, value_name = "[ID@]TIME")]
    pub enter: Vec<When>,
    /// Cut a member off from everything for a length of time (5 s if none is given); its process runs on.
    #[arg(long, value_name = "ID@TIME[+LENGTH]")]
    pub partition: Vec<When>,
    /// Cut a member off from the other members only, for a length of time.
    #[arg(long, value_name = "ID@TIME[+LENGTH]")]
    pub split: Vec<When>,
    /// Lose so many of a hundred packets on every member's link, for a length of time.
    #[arg(long, value_name = "PERCENT@TIME[+LENGTH]")]
    pub loss: Vec<When>,
    /// Give a member weight 0: it gives its flows away and goes on dispatching.
    #[arg(long, value_name = "ID@TIME")]
    pub drain: Vec<When>,
    /// Give a drained member its weight back.
    #[arg(long, value_name = "ID@TIME")]
    pub undrain: Vec<When>,
    /// Have a backend fail its health check while it goes on serving what it has.
    #[arg(long, value_name = "ID@TIME")]
    pub fail_backend: Vec<When>,
    /// Have it pass again.
    #[arg(long, value_name = "ID@TIME")]
    pub mend_backend: Vec<When>,
}

impl ScenarioArgs {
    /// The events, in order of time.
    pub fn events(&self) -> Result<Vec<Event>> {
        let lists: [(&str, &[When]); 19] = [
            ("kill", &self.kill),
            ("crash", &self.crash),
            ("pause", &self.pause),
            ("join", &self.join),
            ("leave", &self.leave),
            ("restart", &self.restart),
            ("upgrade", &self.upgrade),
            ("add-backend", &self.add_backend),
            ("drain-backend", &self.drain_backend),
            ("crash-backend", &self.crash_backend),
            ("reload", &self.reload),
            ("enter", &self.enter),
            ("partition", &self.partition),
            ("split", &self.split),
            ("loss", &self.loss),
            ("drain", &self.drain),
            ("undrain", &self.undrain),
            ("fail-backend", &self.fail_backend),
            ("mend-backend", &self.mend_backend),
        ];
        let mut events = Vec::new();
        for (name, whens) in lists {
            for when in whens {
                events.push(event(name, *when)?);
            }
        }
        events.sort_by_key(|event| event.at);
        Ok(events)
    }
}

fn event(name: &str, when: When) -> Result<Event> {
    if when.length.is_some() && !["pause", "partition", "split", "loss"].contains(&name) {
        bail!("{name} takes no length of time; pause, partition, split and loss do");
    }
    if name == "upgrade" && when.target.is_some() {
        bail!("upgrade takes no target: it is for every member in turn; restart takes one");
    }
    let length = when.length.unwrap_or(DEFAULT_LENGTH);
    let target = when
        .target
        .with_context(|| format!("{name} needs a target: write its number before the time, as in 2@5s"));
    let action = match name {
        "kill" => Action::Kill(target?),
        "crash" => Action::Crash(target?),
        "pause" => Action::Pause(target?, length),
        "join" => Action::Join(when.target),
        "leave" => Action::Leave(target?),
        "restart" => Action::Restart(target?),
        "upgrade" => Action::Upgrade,
        "add-backend" => Action::AddBackend(when.target),
        "drain-backend" => Action::DrainBackend(target?),
        "crash-backend" => Action::CrashBackend(target?),
        "reload" => Action::Reload(when.target),
        "enter" => Action::Enter(when.target),
        "partition" => Action::Partition(target?, length),
        "split" => Action::Split(target?, length),
        "loss" => match target? {
            share @ 1..=100 => Action::Loss(share, length),
            share => bail!("loss takes 1 to 100 of a hundred packets, not {share}"),
        },
        "drain" => Action::Drain(target?),
        "undrain" => Action::Undrain(target?),
        "fail-backend" => Action::FailBackend(target?),
        "mend-backend" => Action::MendBackend(target?),
        _ => bail!(
            "there is no event {name:?}: kill, crash, pause, join, leave, restart, upgrade, add-backend, drain-backend, \
             crash-backend, fail-backend, mend-backend, reload, enter, partition, split, loss, drain and undrain are"
        ),
    };
    Ok(Event { at: when.at, action })
}

/// A scenario file: a list of `[[event]]` with `at`, `do`, and where needed `target` and `for`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    event: Vec<FileEvent>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEvent {
    #[serde(with = "humantime_serde")]
    at: Duration,
    r#do: String,
    target: Option<u32>,
    #[serde(default, with = "humantime_serde::option")]
    r#for: Option<Duration>,
}

/// The events of a scenario file, in order of time.
pub fn read(path: &Path) -> Result<Vec<Event>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the scenario {}", path.display()))?;
    parse(&text).with_context(|| format!("the scenario {} is wrong", path.display()))
}

fn parse(text: &str) -> Result<Vec<Event>> {
    let file: File = toml::from_str(text)?;
    let mut events = file
        .event
        .into_iter()
        .map(|line| event(&line.r#do, When { target: line.target, at: line.at, length: line.r#for }))
        .collect::<Result<Vec<_>>>()?;
    events.sort_by_key(|event| event.at);
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_on_the_command_line_name_target_time_and_length() {
        let when = |text: &str| text.parse::<When>();
        let seconds = Duration::from_secs;
        assert_eq!(when("2@5s"), Ok(When { target: Some(2), at: seconds(5), length: None }));
        assert_eq!(when("1m"), Ok(When { target: None, at: seconds(60), length: None }));
        assert_eq!(when("3@5s+2s"), Ok(When { target: Some(3), at: seconds(5), length: Some(seconds(2)) }));
        for wrong in ["", "@5s", "x@5s", "2@", "2@5", "-1@5s", "2@5s+", "2@5s+x"] {
            assert!(when(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_kind_of_a_change_is_found_in_its_words() {
        let length = Duration::from_secs(1);
        for action in [
            Action::Kill(1),
            Action::Crash(1),
            Action::CrashBackend(1),
            Action::Pause(1, length),
            Action::Join(None),
            Action::Leave(1),
            Action::Restart(1),
            Action::Upgrade,
            Action::AddBackend(None),
            Action::AddBackend(Some(1)),
            Action::DrainBackend(1),
            Action::Reload(None),
            Action::Enter(None),
            Action::Partition(1, length),
            Action::Split(1, length),
            Action::Loss(1, length),
            Action::Drain(1),
            Action::Undrain(1),
            Action::FailBackend(1),
            Action::MendBackend(1),
        ] {
            assert_eq!(Action::kind_of(&action.to_string()), Some(action.kind()), "{action}");
        }
        assert_eq!(Action::kind_of("opening"), None);
    }

    #[test]
    fn a_scenario_file_says_the_same_as_the_command_line() {
        let file = parse(
            "[[event]]\nat = \"5s\"\ndo = \"pause\"\ntarget = 2\nfor = \"1s\"\n\
             [[event]]\nat = \"1s\"\ndo = \"add-backend\"\n",
        )
        .unwrap();
        let arguments = ScenarioArgs {
            pause: vec!["2@5s+1s".parse().unwrap()],
            add_backend: vec!["1s".parse().unwrap()],
            ..ScenarioArgs::default()
        };
        assert_eq!(file, arguments.events().unwrap());
        assert_eq!(file[0].action, Action::AddBackend(None), "earlier events come first");
    }

    #[test]
    fn a_scenario_that_makes_no_sense_is_refused_with_a_reason() {
        for (text, reason) in [
            ("[[event]]\nat = \"1s\"\ndo = \"kill\"\n", "needs a target"),
            ("[[event]]\nat = \"1s\"\ndo = \"explode\"\ntarget = 1\n", "there is no event"),
            ("[[event]]\nat = \"1s\"\ndo = \"kill\"\ntarget = 1\nfor = \"1s\"\n", "no length"),
            ("[[event]]\nat = \"soon\"\ndo = \"kill\"\ntarget = 1\n", "at"),
            ("[[event]]\nat = \"1s\"\ndo = \"kill\"\ntarget = 1\nwho = 2\n", "who"),
            ("[[event]]\nat = \"1s\"\ndo = \"upgrade\"\ntarget = 1\n", "every member"),
            ("[[event]]\nat = \"1s\"\ndo = \"loss\"\ntarget = 101\n", "1 to 100"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
