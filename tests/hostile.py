"""How text from outside tries to become something else where it is shown or written."""

from __future__ import annotations

HOSTILE = (
    "x`\n\n```python\nimport os; os.system('touch PWNED')\n```\n`y",
    '"; touch PWNED; "',
    "'; touch PWNED #",
    "$(touch PWNED)",
    "a\nb: [c\n---\n# d",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "user\u202egnp.exe",
    '<img src=x onerror=alert(1)>"><script>alert(2)</script>',
    "![a](http://evil.test) [b](javascript:alert(1)) <http://evil.test>",
    "http://evil.test www.evil.test",
    "&lt;b&gt; &#60;i>",
    "| --- | a \\| b |",
    "{{ 7 * 7 }} {% raw %}",
    "[red]x[/blue] :smile: [/]",
    "- [ ] list",
    "1. one",
    "> quoted",
    "# heading",
    "===",
    "---",
    "*bold* __strong__ ~~gone~~ $x$",
    "~~~\n</details>",
    "\ud800 half",
    "back\\",
    "`",
    " `` ",
)
