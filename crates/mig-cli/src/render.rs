//! What people see: events as lines of text, with colours and a moving line on a terminal only.

use crate::control::GuestTime;
use crate::event::{Arrived, Doubt, Downtime, Event, Pages, Received, Report, Round, Shortfall};
use crate::failure::Failure;
use crate::units::{bytes, millis, rate, round_bytes};

/// How wide the bars are, in characters.
const BAR_WIDTH: usize = 40;

/// Turns events into text.
#[derive(Debug, Clone)]
pub struct Renderer {
    colour: bool,
    live: bool,
    /// Whether the cursor stands behind a line that is to be overwritten.
    on_live_line: bool,
    /// Whether the head of the table of rounds has been shown for this migration.
    head_shown: bool,
    /// Why the guest is in doubt, as it was shown last.
    doubt_shown: String,
}

/// Select Graphic Rendition parameters (ECMA-48).
#[derive(Clone, Copy)]
enum Style {
    Bold = 1,
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
    Cyan = 36,
}

impl Renderer {
    /// `colour`: whether to use colours. `live`: whether a line may be overwritten, as on a terminal.
    pub fn new(colour: bool, live: bool) -> Self {
        Self { colour, live, on_live_line: false, head_shown: false, doubt_shown: String::new() }
    }

    /// The text for an event, line ends included; empty where people need not see it.
    pub fn render(&mut self, event: &Event) -> String {
        if let Event::Copying { round, sent_pages, total_pages } = event {
            return self.copying(*round, *sent_pages, *total_pages);
        }
        if let Event::InDoubt(doubt) = event
            && doubt.asked > 0
            && doubt.failure.cause == self.doubt_shown
        {
            return self.still_in_doubt(doubt);
        }
        let text = self.lines(event);
        if text.is_empty() {
            return text;
        }
        let clear = if std::mem::take(&mut self.on_live_line) { "\r\x1b[2K" } else { "" };
        format!("{clear}{text}")
    }

    fn lines(&mut self, event: &Event) -> String {
        match event {
            Event::Listening { addr } => format!("listening on {}\n", self.paint(Style::Bold, addr)),
            Event::Started(started) => {
                let control = started.control.as_ref().map_or(String::new(), |c| format!(", control {c}"));
                let (memory, vcpus) =
                    (round_bytes(started.memory_bytes), count(started.vcpus.into(), "vCPU"));
                format!("guest {}: {memory}, {vcpus}{control}\n", self.paint(Style::Bold, &started.guest))
            }
            Event::Migrating { to } => {
                self.head_shown = false;
                format!("moving to {}\n", self.paint(Style::Bold, to))
            }
            Event::Connected { version, channels } => {
                let channels = count((*channels).into(), "page channel");
                self.paint(Style::Dim, &format!("connected: protocol {version}, {channels}")) + "\n"
            }
            Event::Round(round) => self.round(round),
            Event::Paused => self.paint(Style::Dim, "guest paused for the switchover") + "\n",
            Event::Running(running) => running.received.as_ref().map_or(String::new(), |r| self.received(r)),
            Event::Estimate(estimated) => estimated.text(),
            Event::Report(report) => self.report(report),
            Event::NotReceived(failure) => {
                self.failure("no guest was received", failure, Style::Yellow) + "still listening\n"
            }
            Event::TurnedAway { peer, cause } => {
                let (peer, cause) = (printable(peer), printable(cause));
                format!(
                    "{}: {cause}; still listening\n",
                    self.paint(Style::Yellow, &format!("turned {peer} away"))
                )
            }
            Event::InDoubt(doubt) => self.in_doubt(doubt),
            Event::WordRefused(failure) => self.failure("the word was not obeyed", failure, Style::Red),
            Event::Error(failure) => self.failure("error", failure, Style::Red),
            Event::Note { text } => format!("{text}\n"),
            Event::Ended { reason } => format!("ended: {reason}\n"),
            Event::Accepted | Event::Committed | Event::Resumed | Event::Copying { .. } => String::new(),
        }
    }

    fn copying(&mut self, round: u32, sent: u64, total: u64) -> String {
        if !self.live || total == 0 {
            return String::new();
        }
        self.on_live_line = true;
        let part = (sent as f64 / total as f64).clamp(0.0, 1.0);
        let bar = self.paint(Style::Cyan, &bar(part, BAR_WIDTH));
        let blank = " ".repeat(BAR_WIDTH.saturating_sub(cells(part, BAR_WIDTH)));
        format!("\r\x1b[2K{round:>5}  {bar}{blank} {:>3.0} %", part * 100.0)
    }

    fn in_doubt(&mut self, doubt: &Doubt) -> String {
        self.doubt_shown.clone_from(&doubt.failure.cause);
        if doubt.asked == 0 {
            let title = "in doubt: the other side may run the guest; it is held here, paused";
            return self.failure(title, &doubt.failure, Style::Red);
        }
        let cause = printable(&doubt.failure.cause);
        format!("{}: {cause}\n", self.paint(Style::Yellow, &format!("in doubt for {}", millis(doubt.for_ms))))
    }

    fn still_in_doubt(&mut self, doubt: &Doubt) -> String {
        if !self.live {
            return String::new();
        }
        self.on_live_line = true;
        let asked = count(doubt.asked.into(), "time");
        format!("\r\x1b[2Kin doubt for {}: asked {asked} in vain", millis(doubt.for_ms))
    }

    fn round(&mut self, round: &Round) -> String {
        let mut text = String::new();
        if !std::mem::replace(&mut self.head_shown, true) {
            let head = format!(
                "{:>5} {:>10} {:>10} {:>12} {:>9}  next",
                "round", "sent", "dirtied", "rate", "pause now"
            );
            text.push_str(&self.paint(Style::Dim, &head));
            text.push('\n');
        }
        let next = match (round.decision.as_str(), &round.stop_reason) {
            ("switch-over", Some(reason)) => self.paint(Style::Green, &format!("switch over: {reason}")),
            ("abort", Some(reason)) => self.paint(Style::Red, &format!("give up: {reason}")),
            ("throttle" | "hold-back", _) => self.paint(Style::Yellow, &format!("on: {}", round.why)),
            _ => format!("on: {}", round.why),
        };
        text.push_str(&format!(
            "{:>5} {:>10} {:>10} {:>12} {:>9}  {next}\n",
            round.round,
            bytes(round.sent_bytes),
            bytes(round.dirtied_bytes),
            bytes(round.bytes_per_second) + "/s",
            millis(round.predicted_downtime_ms),
        ));
        text
    }

    fn received(&self, received: &Received) -> String {
        let gap = match received.guest_gap_ms {
            Some(gap) => format!("; the guest itself missed {}", millis(gap)),
            None => String::new(),
        };
        let time = received.guest_time.as_ref().map_or(String::new(), guest_time);
        format!(
            "{}: {} in {}, {} received, load {}, resume {}{gap}{time}\n",
            self.paint(Style::Green, "the guest runs here"),
            round_bytes(received.ram_bytes),
            count(received.rounds.into(), "round"),
            bytes(received.received_bytes),
            millis(received.load_ms),
            millis(received.resume_ms),
        )
    }

    fn report(&mut self, report: &Report) -> String {
        self.head_shown = false;
        let mut text = match report.outcome.as_str() {
            "moved" => self.moved(report),
            "still-here" => self.paint(Style::Yellow, "not moved: the guest is still here") + "\n",
            _ => self.paint(Style::Red, "discarded here, on an operator's word") + "\n",
        };
        if let Some(slowed) = &report.slowed {
            let kept = slowed
                .least_speed_percent
                .map_or(String::new(), |percent| format!("; it kept {percent} % of its speed"));
            text.push_str(&format!(
                "the guest was slowed for {}: vCPUs held for {} of it, {} % at most{kept}\n",
                millis(slowed.lasted_ms),
                millis(slowed.held_ms),
                slowed.most_percent,
            ));
        }
        if let Some(shortfall) = &report.shortfall {
            text.push_str(&self.shortfall(shortfall));
        }
        if let Some(fault) = &report.fault {
            text.push_str(&facts(fault));
        }
        text
    }

    /// Why the pause did not fit, and what would have made it fit.
    fn shortfall(&self, shortfall: &Shortfall) -> String {
        let Shortfall { dirty_bytes_per_second, bytes_per_second, met_limit_ms, could_slow_more } =
            *shortfall;
        let title = self.paint(Style::Yellow, "no pause within the budget was to be had");
        let enough = rate(2 * dirty_bytes_per_second.max(bytes_per_second));
        let slower = if could_slow_more { ", --priority never-over-budget" } else { "" };
        format!(
            "{title}: the guest dirtied {}, {} came through. A link of {enough}{slower} or a --downtime of {} would \
             have done\n",
            rate(dirty_bytes_per_second),
            rate(bytes_per_second),
            millis(met_limit_ms),
        )
    }

    fn moved(&self, report: &Report) -> String {
        let mut text = format!(
            "{} in {}, {}, {} sent for {} of memory\npages: {}\n",
            self.paint(Style::Green, "moved"),
            millis(report.total_ms),
            count(report.rounds.into(), "round"),
            bytes(report.sent_bytes),
            round_bytes(report.ram_bytes),
            pages(report.pages),
        );
        if let (Some(total), Some(downtime)) = (report.downtime_ms, &report.downtime) {
            let predicted = report.predicted_downtime_ms.map(|p| format!("predicted {}", millis(p)));
            let gap = report.guest_gap_ms.map(|g| format!("the guest itself missed {}", millis(g)));
            let remarks: Vec<String> = predicted.into_iter().chain(gap).collect();
            let remarks =
                if remarks.is_empty() { String::new() } else { format!(" ({})", remarks.join("; ")) };
            text.push_str(&format!(
                "downtime {}{remarks}\n{}",
                self.paint(Style::Bold, &millis(total)),
                self.split(total, downtime)
            ));
        }
        match (report.verify.as_str(), report.verified_chunks) {
            ("ok", Some(chunks)) => {
                text.push_str(&format!("verified: the digests of {} agree\n", count(chunks, "chunk")));
            }
            ("ok", None) => text.push_str("verified: all digests agree\n"),
            _ => {}
        }
        text
    }

    /// One line a part of the downtime, its bar beginning where the part before it ended.
    fn split(&self, total: f64, downtime: &Downtime) -> String {
        let mut text = String::new();
        let mut before = 0.0;
        for (name, ms) in downtime.parts() {
            if name == "verify" && ms == 0.0 {
                continue;
            }
            let whole = total.max(f64::MIN_POSITIVE);
            let indent = cells(before / whole, BAR_WIDTH - 1);
            let width = (cells((before + ms) / whole, BAR_WIDTH).saturating_sub(indent)).max(1);
            let bar = self.paint(Style::Cyan, &"█".repeat(width));
            text.push_str(&format!("  {name:<10}{:>10}  {}{bar}\n", millis(ms), " ".repeat(indent)));
            before += ms;
        }
        text
    }

    fn failure(&self, title: &str, failure: &Failure, style: Style) -> String {
        format!("{}\n{}", self.paint(style, title), facts(failure))
    }

    fn paint(&self, style: Style, text: &str) -> String {
        if self.colour { format!("\x1b[{}m{text}\x1b[0m", style as u8) } else { text.to_owned() }
    }
}

/// The four answers, a line each.
pub fn facts(failure: &Failure) -> String {
    let mut text = String::new();
    let answers = [
        ("side", &failure.side),
        ("step", &failure.step),
        ("cause", &failure.cause),
        ("remedy", &failure.remedy),
    ];
    for (name, answer) in answers {
        if !answer.is_empty() {
            text.push_str(&format!(
                "  {:<8}{}\n",
                format!("{name}:"),
                printable(answer).replace('\n', "\n          ")
            ));
        }
    }
    text
}

/// Text that may come from a peer, without what would steer a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// By how they travelled; encodings only if they were used.
fn pages(pages: Pages) -> String {
    let Pages { zero, raw, zstd, delta } = pages;
    let kinds = [(raw, "raw", true), (zstd, "zstd", false), (delta, "delta", false), (zero, "zero", true)];
    let shown = kinds.iter().filter(|(count, _, always)| *always || *count > 0);
    shown.map(|(count, kind, _)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}

fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn cells(part: f64, width: usize) -> usize {
    ((part.clamp(0.0, 1.0) * width as f64).round() as usize).min(width)
}

fn bar(part: f64, width: usize) -> String {
    "█".repeat(cells(part, width))
}

fn guest_time(time: &Arrived) -> String {
    if time.source_ahead_ms > 0.0 {
        let ahead = millis(time.source_ahead_ms);
        return format!("\nguest time stood still: the source's wall clock is {ahead} ahead of this host's");
    }
    let skew = if time.skew_at_most_ms > 0.0 { ", by the hosts' wall clocks" } else { "" };
    match time.choice {
        GuestTime::Advance => format!("; guest time advanced {}{skew}", millis(time.advanced_ms)),
        GuestTime::Stop => "; guest time stood still".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Slowed, examples};

    fn plain() -> Renderer {
        Renderer::new(false, false)
    }

    #[test]
    fn a_round_is_one_line_below_a_head_that_is_shown_once() {
        let mut renderer = plain();
        let round = Event::Round((&examples::round()).into());
        let line = "    0  128.0 MiB   20.0 MiB  320.0 MiB/s   71.2 ms  on: fits in 2 rounds\n";
        let head = "round       sent    dirtied         rate pause now  next\n";
        assert_eq!(renderer.render(&round), format!("{head}{line}"));
        assert_eq!(renderer.render(&round), line);
        let mut large: Round = (&examples::round()).into();
        (large.sent_bytes, large.dirtied_bytes) = (1023 << 30, 1023 << 30);
        (large.bytes_per_second, large.predicted_downtime_ms) = (1023 << 20, 99_000.0);
        (large.decision, large.stop_reason) = ("switch-over".into(), Some("within-budget".into()));
        let line = renderer.render(&Event::Round(large));
        assert!(line.len() <= 80, "it fits a terminal: {line}");
    }

    #[test]
    fn a_report_says_what_the_guest_was_denied_and_what_would_have_made_the_pause_fit() {
        let mut report: Report = (&examples::moved()).into();
        report.slowed = Some(Slowed {
            most_percent: 60,
            lasted_ms: 4000.0,
            held_ms: 1800.0,
            least_speed_percent: Some(70),
        });
        report.shortfall = Some(Shortfall {
            dirty_bytes_per_second: 250_000_000,
            bytes_per_second: 125_000_000,
            met_limit_ms: 1234.0,
            could_slow_more: true,
        });
        let text = plain().render(&Event::Report(Box::new(report)));
        assert!(
            text.contains(
                "slowed for 4.00 s: vCPUs held for 1.80 s of it, 60 % at most; it kept 70 % of its speed\n"
            ),
            "{text}"
        );
        assert!(
            text.contains("the guest dirtied 2 Gbit/s, 1 Gbit/s came through. A link of 4 Gbit/s"),
            "{text}"
        );
        assert!(text.contains("never-over-budget or a --downtime of 1.23 s would"), "{text}");
    }

    #[test]
    fn the_end_of_a_round_says_which_rule_fired() {
        let mut round: Round = (&examples::round()).into();
        round.decision = "switch-over".into();
        round.stop_reason = Some("few-pages".into());
        assert!(plain().render(&Event::Round(round.clone())).ends_with("  switch over: few-pages\n"));
        round.decision = "abort".into();
        assert!(plain().render(&Event::Round(round)).ends_with("  give up: few-pages\n"));
    }

    #[test]
    fn how_guest_time_went_on_is_told_with_what_it_rests_on() {
        let mut arrived = Arrived {
            choice: GuestTime::Advance,
            advanced_ms: 1.5,
            same_host: true,
            skew_at_most_ms: 0.0,
            source_ahead_ms: 0.0,
        };
        assert_eq!(guest_time(&arrived), "; guest time advanced 1.50 ms");
        arrived.skew_at_most_ms = 1.5;
        assert!(guest_time(&arrived).ends_with("by the hosts' wall clocks"));
        arrived.source_ahead_ms = 7.0;
        assert!(guest_time(&arrived).contains("wall clock is 7.00 ms ahead"));
        let stopped = Arrived { choice: GuestTime::Stop, source_ahead_ms: 0.0, ..arrived };
        assert_eq!(guest_time(&stopped), "; guest time stood still");
    }

    #[test]
    fn encodings_that_were_not_used_are_not_shown() {
        assert_eq!(pages(Pages { zero: 2, raw: 1, zstd: 0, delta: 0 }), "1 raw, 2 zero");
        assert_eq!(pages(Pages { zero: 0, raw: 0, zstd: 3, delta: 0 }), "0 raw, 3 zstd, 0 zero");
    }

    #[test]
    fn the_report_splits_the_downtime() {
        let text = plain().render(&Event::Report(Box::new((&examples::moved()).into())));
        let expected = "\
moved in 1.24 s, 4 rounds, 530.0 MiB sent for 1 GiB of memory
pages: 130000 raw, 4000 zstd, 1000 delta, 100000 zero
downtime 5.00 ms (predicted 5.50 ms; the guest itself missed 5.90 ms)
  pause        0.30 ms  ██
  save         0.42 ms    ████
  last sync    0.11 ms        █
  transfer     3.00 ms        ███████████████████████
  load         0.70 ms                               █████
  commit       0.27 ms                                    ██
  resume       0.20 ms                                      ██
verified: the digests of 512 chunks agree
";
        let squeezed = |t: &str| t.lines().map(|l| l.trim_end().to_owned()).collect::<Vec<_>>();
        let (got, want) = (squeezed(&text), squeezed(expected));
        assert_eq!(got.len(), want.len(), "{text}");
        for (line, (got, want)) in got.iter().zip(&want).enumerate() {
            // Bars: the same words, and a bar on each line.
            let words = |l: &str| l.replace('█', "").split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(words(got), words(want), "line {line} of\n{text}");
            assert_eq!(got.contains('█'), want.contains('█'), "line {line} of\n{text}");
        }
        let filled = text.matches('█').count();
        assert!(
            (BAR_WIDTH..=BAR_WIDTH + 8).contains(&filled),
            "the parts fill the bar once: {filled}\n{text}"
        );
    }

    #[test]
    fn a_failure_gives_its_four_answers() {
        let text = plain().render(&Event::Report(Box::new((&examples::refused()).into())));
        assert_eq!(
            text,
            "not moved: the guest is still here\n  side:   source\n  step:   connect\n  \
             cause:  connection refused\n  remedy: start mig-recv there first\n"
        );
    }

    #[test]
    fn a_doubt_is_told_once_with_what_to_do_and_then_in_a_line_that_moves() {
        let failure = Failure::new("source", "commit", "silent", "resolve");
        let doubt = |asked, failure: &Failure| {
            Event::InDoubt(Doubt { for_ms: 1500.0, asked, failure: failure.clone() })
        };
        let mut log = plain();
        let first = log.render(&doubt(0, &failure));
        assert!(first.starts_with("in doubt: ") && first.ends_with("  remedy: resolve\n"), "{first}");
        assert_eq!(log.render(&doubt(1, &failure)), "", "a log is not filled with it");
        let refused = Failure { cause: "refused".into(), ..failure.clone() };
        assert_eq!(log.render(&doubt(2, &refused)), "in doubt for 1.50 s: refused\n");
        assert_eq!(log.render(&doubt(3, &refused)), "");
        let mut terminal = Renderer::new(false, true);
        terminal.render(&doubt(0, &failure));
        assert_eq!(
            terminal.render(&doubt(2, &failure)),
            "\r\x1b[2Kin doubt for 1.50 s: asked 2 times in vain"
        );
        assert!(
            terminal.render(&Event::Resumed).is_empty() && terminal.render(&Event::Paused).starts_with('\r')
        );
    }

    #[test]
    fn a_peer_cannot_steer_the_terminal() {
        let failure = Failure::new("source", "handshake", "peer said \x1b[2J\x07", "");
        let text = plain().render(&Event::Error(failure));
        assert!(!text.contains(['\x1b', '\x07']), "{text:?}");
        assert!(!text.contains("remedy"), "an empty remedy is not shown");
    }

    #[test]
    fn only_a_terminal_gets_escapes_and_a_moving_line() {
        let copying = Event::Copying { round: 0, sent_pages: 1, total_pages: 2 };
        assert_eq!(plain().render(&copying), "");
        let mut terminal = Renderer::new(true, true);
        assert!(terminal.render(&copying).ends_with(" 50 %"));
        let paused = terminal.render(&Event::Paused);
        assert!(paused.starts_with("\r\x1b[2K"), "the moving line is cleared: {paused:?}");
        assert!(!terminal.render(&Event::Paused).starts_with('\r'), "once");
        assert!(!plain().render(&Event::Report(Box::new((&examples::moved()).into()))).contains('\x1b'));
        let empty = Event::Copying { round: 0, sent_pages: 0, total_pages: 0 };
        assert_eq!(terminal.render(&empty), "", "a round without pages has no bar");
    }
}
