"""What a model may write to take over a page or a terminal, and what may stand for it."""

HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "<!--<script>",
    "\x1b]0;taken\x07\x1b[2J\x9b2J",
    "\u202egnp.exe\u2066 \u2028\u2029 \x00 \r",
    "{{ 7 * 7 }} ${7*7} &lt;b&gt; \\u003cb",
    "[red]not markup[/red]",
]
