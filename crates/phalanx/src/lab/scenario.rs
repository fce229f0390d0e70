//! What is done to the site, and when.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// Pause without a length.
const DEFAULT_PAUSE: Duration = Duration::from_secs(5);

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
            Self::AddBackend(Some(id)) => write!(f, "add backend {id}"),
            Self::AddBackend(None) => write!(f, "add a backend"),
            Self::DrainBackend(id) => write!(f, "drain backend {id}"),
            Self::CrashBackend(id) => write!(f, "crash backend {id}"),
            Self::Reload(Some(id)) => write!(f, "reload {id}"),
            Self::Reload(None) => write!(f, "reload all"),
            Self::Enter(Some(id)) => write!(f, "enter by {id}"),
            Self::Enter(None) => write!(f, "enter by all"),
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
}

impl ScenarioArgs {
    /// The events, in order of time.
    pub fn events(&self) -> Result<Vec<Event>> {
        let lists: [(&str, &[When]); 11] = [
            ("kill", &self.kill),
            ("crash", &self.crash),
            ("pause", &self.pause),
            ("join", &self.join),
            ("leave", &self.leave),
            ("restart", &self.restart),
            ("add-backend", &self.add_backend),
            ("drain-backend", &self.drain_backend),
            ("crash-backend", &self.crash_backend),
            ("reload", &self.reload),
            ("enter", &self.enter),
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
    if when.length.is_some() && name != "pause" {
        bail!("{name} takes no length of time, only a pause does");
    }
    let target = when
        .target
        .with_context(|| format!("{name} needs a target: write its number before the time, as in 2@5s"));
    let action = match name {
        "kill" => Action::Kill(target?),
        "crash" => Action::Crash(target?),
        "pause" => Action::Pause(target?, when.length.unwrap_or(DEFAULT_PAUSE)),
        "join" => Action::Join(when.target),
        "leave" => Action::Leave(target?),
        "restart" => Action::Restart(target?),
        "add-backend" => Action::AddBackend(when.target),
        "drain-backend" => Action::DrainBackend(target?),
        "crash-backend" => Action::CrashBackend(target?),
        "reload" => Action::Reload(when.target),
        "enter" => Action::Enter(when.target),
        _ => bail!(
            "there is no event {name:?}: kill, crash, pause, join, leave, restart, add-backend, drain-backend, \
             crash-backend, reload and enter are"
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
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
