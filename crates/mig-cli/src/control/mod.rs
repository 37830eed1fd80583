//! The control socket's language: a JSON object a line, each answered by one with `ok`.
//!
//! See `docs/cli.md`. Requests are hostile until [`Request::parse`] has read them.

mod client;
mod server;

pub use client::{Client, Finished};
pub use server::{Commands, Server, Socket};

use std::time::Duration;

use clap::ValueEnum;
use mig::encoding::UnknownCompress;
use mig::pacing::Bandwidth;
use mig::policy::Policy;
use mig::{Address, SourceOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::bandwidth::{Cap, PauseCap};
use crate::convergence::{self, OnStall, Priority};
use crate::estimate::Estimate;
use crate::event::{Doubt, Report};
use crate::failure::Failure;
use crate::machine::Settings;

/// The longest line that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// The commands, in the order in which an error lists them.
pub const COMMANDS: [&str; 11] = [
    "status",
    "migrate",
    "estimate",
    "bandwidth",
    "cancel",
    "resolve",
    "pause",
    "resume",
    "screen",
    "check",
    "quit",
];

/// Something that is asked of a holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Request {
    /// What is held, and how that is.
    Status,
    /// Move the guest; answered when the migration has ended.
    Migrate(Migrate),
    /// Watch the guest, and foretell migrations.
    Estimate(Estimate),
    /// Cap what the migration that runs may take.
    Bandwidth {
        /// From now on.
        rate: Cap,
    },
    /// End the migration that runs.
    Cancel,
    /// Decide about a guest in doubt; answered when that has been obeyed or refused.
    Resolve {
        /// How.
        word: Word,
    },
    /// Pause the guest.
    Pause,
    /// Resume it.
    Resume,
    /// Its VGA text page.
    Screen,
    /// Check what a built-in guest put into its memory.
    Check,
    /// End the guest and the program.
    Quit,
}

/// How to migrate; what is absent is as the holder's default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// The receiver's address.
    pub to: String,
    /// The longest pause that is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// The most rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rounds: Option<u32>,
    /// What matters most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// What to do when rounds do not shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_stall: Option<OnStall>,
    /// What the guest keeps of its speed at least while it is slowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_speed_percent: Option<u8>,
    /// Page channels; as many as suit both hosts where it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<u16>,
    /// Whether pages are encoded, as `--compress` has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<String>,
    /// What they may take of the link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Cap>,
    /// What the pause may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_bandwidth: Option<PauseCap>,
    /// Compare digests of all memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
    /// What the guest's time does across the pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_time: Option<GuestTime>,
    /// Send events, a line each, before the answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub progress: bool,
}

/// An operator's word on a guest in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// The other side does not run it and never will: run it here. If that is wrong, two guests run
    Resume,
    /// The other side runs it: drop it here. If that is wrong, none is left
    Discard,
}

impl From<Word> for mig::Word {
    fn from(word: Word) -> Self {
        match word {
            Word::Resume => Self::Resume,
            Word::Discard => Self::Discard,
        }
    }
}

/// What the guest's time does across the pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum GuestTime {
    /// It goes on: the pause is time that passed
    Advance,
    /// It stands still: the guest falls behind the world by the pause, and sees none
    Stop,
}

impl From<GuestTime> for mig_vmm::GuestTime {
    fn from(choice: GuestTime) -> Self {
        match choice {
            GuestTime::Advance => Self::Advance,
            GuestTime::Stop => Self::Stop,
        }
    }
}

impl From<mig_vmm::GuestTime> for GuestTime {
    fn from(choice: mig_vmm::GuestTime) -> Self {
        match choice {
            mig_vmm::GuestTime::Advance => Self::Advance,
            mig_vmm::GuestTime::Stop => Self::Stop,
        }
    }
}

/// The answer to `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `running`, `paused`, `migrating`, `receiving`, `in-doubt` or `ended`.
    pub state: String,
    /// Heartbeats counted here so far.
    pub heartbeats: u64,
    /// The guest's vCPUs; 0 before there is one.
    pub vcpus: u32,
    /// The guest's memory; 0 before there is one.
    pub memory_bytes: u64,
    /// Since when, why, and what is asked for, while it is in doubt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Doubt>,
}

/// The answer to `resolve`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// What the holder holds now, as in [`Status`].
    pub state: String,
}

/// The answer to `screen`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Screen {
    /// 25 lines.
    pub screen: Vec<String>,
}

/// The answer to `check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked and found right, in words.
    pub found: String,
    /// Heartbeats counted so far.
    pub heartbeats: u64,
}

/// An answer: `ok`, and the members of what was asked for, or an error.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer(Map<String, Value>);

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no request, with what would be one.
    pub fn parse(line: &[u8]) -> Result<Self, Failure> {
        let wrong = |cause: String, remedy: String| Failure::new("control", "control", cause, remedy);
        let example = || r#"send a JSON object a line, as {"cmd": "status"}"#.to_owned();
        let value: Value = serde_json::from_slice(line)
            .map_err(|e| wrong(format!("the line is not JSON: {e}"), example()))?;
        let Some(command) = value.get("cmd").and_then(Value::as_str) else {
            return Err(wrong("the line is no object with a text 'cmd'".into(), example()));
        };
        if !COMMANDS.contains(&command) {
            let shown: String = command.chars().take(40).collect();
            return Err(wrong(
                format!("command {shown:?} is not known"),
                format!("the commands are {}", COMMANDS.join(", ")),
            ));
        }
        let command = command.to_owned();
        serde_json::from_value(value)
            .map_err(|e| wrong(format!("{command}: {e}"), "see docs/cli.md for its members".into()))
    }
}

impl Migrate {
    /// The address, and how to move.
    ///
    /// # Errors
    /// A value that cannot be.
    pub fn settings(&self) -> Result<(Address, Settings), Failure> {
        let wrong = |cause: String, remedy: &str| Failure::new("source", "options", cause, remedy);
        let to = self
            .to
            .parse::<Address>()
            .map_err(|e| wrong(e.to_string(), "give the receiver's address as tcp:HOST:PORT"))?;
        let defaults = SourceOptions::default();
        let policy = Policy {
            downtime_limit: self.downtime_ms.map_or(defaults.policy.downtime_limit, Duration::from_millis),
            max_rounds: self.max_rounds.unwrap_or(defaults.policy.max_rounds),
            ..convergence::policy(self.priority, self.on_stall, self.keep_speed_percent)
        };
        if policy.max_rounds == 0 {
            return Err(wrong("max_rounds is 0".into(), "give at least 1"));
        }
        convergence::check(self.on_stall, self.keep_speed_percent)?;
        if let Some(channels) = self.channels.filter(|channels| !(1..=64).contains(channels)) {
            return Err(wrong(format!("channels is {channels}"), "give 1 to 64, or leave it out"));
        }
        let compress = match &self.compress {
            None => defaults.compress,
            Some(text) => text.parse().map_err(|e: UnknownCompress| {
                wrong(format!("compress: {e}"), "give one of them, or leave it out")
            })?,
        };
        let verify = self.verify.unwrap_or(defaults.verify);
        let bandwidth = Bandwidth {
            cap_bytes_per_second: self.bandwidth.and_then(|cap| cap.0),
            in_pause: self.pause_bandwidth.map(|cap| cap.0).unwrap_or_default(),
        };
        let engine =
            SourceOptions { policy, channels: self.channels, compress, bandwidth, verify, ..defaults };
        let guest_time = self.guest_time.map(Into::into).unwrap_or_default();
        Ok((to, Settings { engine, guest_time }))
    }
}

impl Answer {
    /// Success, with the members of `value` (an object, or nothing).
    pub fn ok(value: &impl Serialize) -> Self {
        let mut members = Map::new();
        members.insert("ok".into(), true.into());
        if let Ok(Value::Object(object)) = serde_json::to_value(value) {
            members.extend(object);
        }
        Self(members)
    }

    /// Failure.
    pub fn error(failure: &Failure) -> Self {
        let mut members = Map::new();
        members.insert("ok".into(), false.into());
        members.insert("error".into(), serde_json::to_value(failure).unwrap_or_default());
        Self(members)
    }

    /// Adds how a migration went.
    #[must_use]
    pub fn with_report(mut self, report: Option<&Report>) -> Self {
        if let Some(report) = report {
            self.0.insert("report".into(), serde_json::to_value(report).unwrap_or_default());
        }
        self
    }

    /// The answer as a line, its end included.
    pub fn line(&self) -> String {
        serde_json::to_string(&self.0).unwrap_or_else(|_| r#"{"ok":false}"#.into()) + "\n"
    }

    /// Reads an answer; none if the line is something else, an event for example.
    pub fn parse(line: &[u8]) -> Option<Self> {
        match serde_json::from_slice(line) {
            Ok(Value::Object(members)) if members.contains_key("ok") => Some(Self(members)),
            _ => None,
        }
    }

    /// Whether it is a success.
    pub fn is_ok(&self) -> bool {
        self.0.get("ok") == Some(&Value::Bool(true))
    }

    /// All members, read as a `T`.
    pub fn members<T: serde::de::DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_value(Value::Object(self.0.clone())).ok()
    }

    /// A member, read as a `T`.
    pub fn member<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<T> {
        self.0.get(name).and_then(|v| serde_json::from_value(v.clone()).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_documented() {
        assert_eq!(Request::parse(br#"{"cmd": "status"}"#).unwrap(), Request::Status);
        let migrate = Request::parse(
            br#"{"cmd":"migrate","to":"tcp:h:1","downtime_ms":10,"max_rounds":3,"channels":4,"compress":"zstd:3","verify":true,"guest_time":"stop"}"#,
        )
        .unwrap();
        let Request::Migrate(migrate) = migrate else { panic!("{migrate:?}") };
        let (to, Settings { engine: options, guest_time }) = migrate.settings().unwrap();
        assert_eq!(to.to_string(), "tcp:h:1");
        assert_eq!(options.policy.downtime_limit, Duration::from_millis(10));
        assert_eq!((options.policy.max_rounds, options.channels, options.verify), (3, Some(4), true));
        assert_eq!(guest_time, mig_vmm::GuestTime::Stop);
        assert_eq!(options.compress.to_string(), "zstd:3");
        assert!(!migrate.progress, "events are sent only to who asked for them");
        let resolve = Request::parse(br#"{"cmd":"resolve","word":"discard"}"#).unwrap();
        assert_eq!(resolve, Request::Resolve { word: Word::Discard });
        let bandwidth = Request::parse(br#"{"cmd":"bandwidth","rate":"2Gbit"}"#).unwrap();
        assert_eq!(bandwidth, Request::Bandwidth { rate: Cap(Some(250_000_000)) });
        for command in COMMANDS.iter().filter(|c| !["migrate", "resolve", "bandwidth"].contains(c)) {
            assert!(Request::parse(format!(r#"{{"cmd":"{command}"}}"#).as_bytes()).is_ok(), "{command}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_what_would_be_one() {
        let unknown = Request::parse(br#"{"cmd": "explode"}"#).unwrap_err();
        assert!(unknown.cause.contains("explode"), "{unknown:?}");
        for command in COMMANDS {
            assert!(unknown.remedy.contains(command), "{command} is listed");
        }
        for line in [
            &b""[..],
            b"x",
            b"{}",
            b"[]",
            b"7",
            br#"{"cmd":7}"#,
            b"\xff\xfe",
            br#"{"cmd":"migrate"}"#,
            br#"{"cmd":"resolve"}"#,
            br#"{"cmd":"bandwidth"}"#,
            br#"{"cmd":"estimate","to":"tcp:h:1"}"#,
            br#"{"cmd":"bandwidth","rate":5}"#,
            br#"{"cmd":"bandwidth","rate":"much"}"#,
            br#"{"cmd":"resolve","word":"maybe"}"#,
        ] {
            assert!(Request::parse(line).is_err(), "{line:?}");
        }
        let typo = Request::parse(br#"{"cmd":"migrate","to":"tcp:h:1","verfy":true}"#).unwrap_err();
        assert!(typo.cause.contains("verfy"), "{typo:?}");
        let deep = [b"[".repeat(30_000), b"]".repeat(30_000)].concat();
        assert!(Request::parse(&deep).is_err());
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_name() {
        let migrate = |change: fn(&mut Migrate)| {
            let mut migrate = Migrate { to: "tcp:h:1".into(), ..Migrate::default() };
            change(&mut migrate);
            migrate.settings().unwrap_err().cause
        };
        assert!(migrate(|m| m.to = "h".into()).contains("transport"));
        assert!(migrate(|m| m.max_rounds = Some(0)).contains("max_rounds"));
        assert!(migrate(|m| m.channels = Some(65)).contains("channels"));
        assert!(migrate(|m| m.keep_speed_percent = Some(0)).contains("keep_speed"));
        assert!(
            migrate(|m| (m.keep_speed_percent, m.on_stall) = (Some(5), Some(OnStall::Abort)))
                .contains("alone")
        );
        assert!(migrate(|m| m.channels = Some(0)).contains("channels"));
        assert!(migrate(|m| m.compress = Some("zstd:99".into())).contains("compress"));
    }

    #[test]
    fn answers_are_read_back_and_events_are_not_answers() {
        let failure = Failure::new("source", "connect", "refused", "start it");
        let line = Answer::error(&failure).line();
        let answer = Answer::parse(line.as_bytes()).unwrap();
        assert!(!answer.is_ok());
        assert_eq!(answer.member::<Failure>("error").unwrap(), failure);
        let status =
            Status { state: "running".into(), heartbeats: 9, vcpus: 1, memory_bytes: 4096, doubt: None };
        let line = Answer::ok(&status).line();
        assert_eq!(
            serde_json::from_str::<Value>(&line).unwrap(),
            serde_json::json!({"ok": true, "state": "running", "heartbeats": 9, "vcpus": 1, "memory_bytes": 4096})
        );
        assert!(Answer::parse(br#"{"event":"paused"}"#).is_none());
    }
}
