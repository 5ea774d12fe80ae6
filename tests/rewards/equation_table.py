"""Completions by what an equation checker has to say of them, plain ones and adversarial ones.

TRUE: with an equation, and all of them hold. FALSE: with one that doesn't. NONE: without any that is
plain arithmetic, so that nothing may be called false.
"""


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


TRUE = lines(r"""
3 + 4 = 7
3+4=7
She has 40 + 32 = 72 clips.
48 / 2 = 24
48/2=24
6 * 7 = 42
12 - 5 = 7
5 - 12 = -7
-2 + 3 = 1
(1 + 2) * 3 = 9
2 * (3 + 4) = 14
1,200 + 300 = 1,500
1,000,000 - 1 = 999,999
0.5 + 0.25 = 0.75
.5 + .5 = 1
48 ÷ 2 = 24
5 × 3 = 15
5 x 3 = 15
5x3=15
5 − 3 = 2
3 – 5 = −2
2 · 3 = 6
7 = 3 + 4
3 + 4 = 5 + 2
2 + 2 = 4 = 8 / 2
10 / 4 = 2.5 so half of it is next
First 3 + 4 = 7. Then 7 * 2 = 14.
3 + 4 = 7, 7 * 2 = 14, 14 - 4 = 10.
3 + 4 = 7 and 2 + 2 = 4
$5 × 3 = $15
$5 + $3 = $8
€5 + €3 = €8
5€ + 3€ = 8€
$1,200 + $300 = $1,500
5 apples + 3 apples = 8 apples
5 boxes × 3 apples = 15 apples
5 + 3 = 8 apples
60 miles / 2 hours = 30 mph
20% of 50 = 10
50% * 8 = 4
25% + 15% = 40%
5 / 20 = 25%
100% - 30% = 70%
1/2 of 10 = 5
1/2 + 1/4 = 3/4
100/3 = 33.33
2/3 = 0.67
1/3 = 0.333
22/7 = 3.142857
4^2 = 16
4² = 16
2^10 = 1024
2**3 = 8
10^3 - 1 = 999
17 ÷ 5 = 3 with 2 left
17 / 5 = 3 R 2
17 / 5 = 3 remainder 2
17 ÷ 5 = 3, remainder 2
$6 \times 2 = 12$
$2\times3=6$
$2\cdot12=24$
\(6 \times 2 = 12\)
\[6 \times 2 = 12\]
$$6 \cdot 2 = 12$$
6 \div 2 = 3
\frac{6}{2} = 3
\frac{1}{2} + \frac{1}{4} = \frac{3}{4}
\dfrac{1}{2} \times 8 = 4
\frac12 + \frac12 = 1
\left(3 + 4\right) \times 2 = 14
5 \text{ cm} + 3 \text{ cm} = 8 \text{ cm}
5 \, \mathrm{kg} \times 2 = 10 \, \mathrm{kg}
3 + 4 = \boxed{7}
\boxed{3 + 4 = 7}
3 + 4 = \mathbf{7}
20\% \times 50 = 10
\$5 + \$3 = \$8
1{,}200 + 300 = 1{,}500
100/3 ≈ 33
100/3 \approx 33.3
22/7 ≈ 3.14
\begin{aligned} 3 + 4 &= 7 \\ 7 \times 2 &= 14 \end{aligned}
<<48/2=24>>
<<48/2=24>>24
Half of 48 is 48/2 = <<48/2=24>>24.
5*10=$<<5*10=50>>50
<<100*.2=20>>
<<1/3=0.33>>
- 3 + 4 = 7
* 3 + 4 = 7
• 3 + 4 = 7
1. 3 + 4 = 7
1) 3 + 4 = 7
(a) 3 + 4 = 7
Step 1: 3 + 4 = 7
**3 + 4 = 7**
3 + 4 = **7**
`3 + 4 = 7`
| 3 + 4 = 7 | 2 + 2 = 4 |
> 3 + 4 = 7
### 3 + 4 = 7
"3 + 4 = 7"
3 + 4 = 7!
(3 + 4 = 7)
She has 7 (3 + 4 = 7) apples.
½ + ½ = 1
２ + ２ = ４
2 1/2 + 1 = 3 1/2
""")

TRUE_ADVERSARIAL = [
    *lines(r"""
- 3 + 4 = 1
-3 + 4 = 1
− 3 + 4 = 7
- 10 - 3 = 7
5 - (-3) = 8
5 - -3 = 8
(-2)^2 = 4
-2^2 = -4
2^{-1} = 0.5
10^{2} × 3 = 300
2^3^2 = 512
8 / (3 - 8 / 3) = 24
100 / 5 / 2 = 10
100 - 20 - 30 = 50
2 + 3 × 4 = 14
2(3 + 4) = 14
(2)(3) = 6
2\frac{1}{2} + 1 = 3.5
2½ + ½ = 3
6 ÷ ½ = 12
\frac{3 + 5}{2} = 4
\frac{1}{2}(6) = 3
\frac{\frac{1}{2}}{2} = \frac{1}{4}
x = 3 + 4 = 7
Total = 5 × 3 = 15
f(2) = 2 + 2 = 4
2x = 3 + 4 = 7
y = 2(3) + 1 = 7
A = πr² = 3.14 × 2^2 = 12.56
3 + 4 = 7 so 2 + 2 = 4
3 + 4 = 7 apples and 2 + 2 = 4 pears
3 + 4 = 7 → 7 × 2 = 14
3 + 4 = 7 \implies 7 \times 2 = 14
3 + 4 = 7 ⇒ 2 × 7 = 14
3 + 4 = 7; 2 × 7 = 14
3 + 4 = 7 > 6
12 = 3 × 4 ≠ 13
10 > 2 + 3 = 5
5 red apples + 3 green apples = 8 apples
5 apples per box × 3 boxes = 15 apples
30 miles/hour × 2 hours = 60 miles
$15/hour × 3 hours = $45
5cm + 3cm = 8cm
3 m × 2 m = 6 m²
3 cm × 2 cm = 6 cm^2
90° + 45° = 135°
50¢ + 25¢ = 75¢
5 million + 2 million = 7 million
0.1 + 0.2 = 0.30000000000000004
2/3 = 0.6667
2/3 = 0.666...
1/7 = 0.142857…
3.999 × 2 = 8.0
33.33 + 33.33 = 66.7
10/3 = 3.33 = 3.3
49 × 51 ≈ 2500
49 × 51 ≈ 50 × 50 = 2500
100/3 = about 33
100/3 = approximately 33.3
100/3 = ~33
5 times 3 = 15
3 plus 4 = 7
20 divided by 4 = 5
5 multiplied by 3 = 15
5/20 × 100 = 25%
200 × 15% = 30
1.500 + 500 = 2.000
2,5 + 2,5 = 5
1,00,000 + 1 = 1,00,001
1\,000 + 1 = 1\,001
(1) 3 + 4 = 7
[1] 3 + 4 = 7
1.) 3 + 4 = 7
- **3 + 4 = 7**
*3 + 4 = 7*
3 + 4 = *7*
2 × 3 = 6.
2 × 3 = 6.0.
the sum of 3 + 4 = 7
Since 3 + 4 = 7, we go on.
3 + 4 = 7 - which is odd
3 + 4 = 7 — odd
3 + 4 = 7...
答案是 3 + 4 = 7
共3 + 4 = 7个
3 + 4 = 7 🎉
3 + 4 = 7 ✓
She has a total of 28 x 4 = 112 bananas.
Together, they have $14 + 6 = 20$ books.
They pay $5 each: 3 × $5 = $15.
$5+$3=$8
b² - 4ac = 5² - 4(1)(6) = 25 - 24 = 1
\frac{-b \pm 1}{2} = \frac{5+1}{2} = 3
P = 2(l + w) = 2(5 + 3) = 2(8) = 16
12 eggs/dozen × 3 dozen = 36 eggs
Speed = distance/time = 120 km / 2 h = 60 km/h
(30 - 24)/24 × 100% = 25%
Total: 3 × $4 + 2 × $5 = $12 + $10 = $22.
5! = 5 × 4 × 3 × 2 × 1 = 120
\binom{5}{2} = \frac{5 \cdot 4}{2} = 10
17 mod 5 = 2 since 17 = 5*3 + 2
f(-2) = (-2)^2 - 4 = 0
f'(3) = 2*3 = 6
Since 12/16 = 3/4 = 0.75 = 75%, we get 75%.
1 + 2/3 = 1 2/3 = 5/3
3 000 + 4 000 = 7 000 is unread, but 3 + 4 = 7
10^6 / 10^3 = 10^3 = 1000
8 ÷ 2 × 4 = 16
9 - 3 ÷ (1/3) + 1 = 1
14÷1/2=28
2(3) + 1 = 7 ≠ 8
Try 5: 5 × 5 = 25 > 20.
17 / 5 = 3 R2
17 / 5 = 3r2
17 ÷ 5 = 3 with a remainder of 2
17 / 5 = 3 and 2 left over
\frac{17}{5} = 3.4
$\frac{100}{3} \approx 33.33$
$$\begin{align*} x &= 3 + 4 \\ &= 7 \end{align*}$$
\\frac{1}{2} + \\frac{1}{2} = 1
3 \\times 4 = 12
<<3+4=7>> and 2 + 2 = 4
<<5 apples + 3 apples = 8 apples>>
<<$5*2=$10>>
<<20%*50=10>>
24 = 4! is unread, but 24 = 4 × 6
5 + 3% = 8%
12 / 5 = 2 2/5
"""),
    "3 + 4\n= 7",
    "3 + 4\n  = 7\n  = 14 / 2",
    "$$\n3 + 4\n= 7\n$$",
    "- 3 + 4 = 7\n- 2 + 2 = 4\n- 10 - 4 = 6",
    "* 3 + 4 = 7\n* 2 + 2 = 4",
    "3 + 4 = 7\n2 + 2 = 4",
    "12\n- 5 + 2 = 7",
    "3 + 4 \\\\ &= 7",
    "3\u00a0+\u00a04\u00a0=\u00a07",
    "３ × ４ ＝ １２",
]  # fmt: skip

FALSE = lines(r"""
3 + 4 = 8
3+4=8
She has 40 + 32 = 73 clips.
48 / 2 = 25
6 * 7 = 41
12 - 5 = 8
5 - 12 = 7
5 - 12 = -8
(1 + 2) * 3 = 10
1,200 + 300 = 1,600
0.5 + 0.25 = 0.8125
48 ÷ 2 = 23
5 × 3 = 16
5 x 3 = 16
5 − 3 = 3
7 = 3 + 5
2 + 2 = 4 = 5
2 + 2 = 5 = 4
3 + 4 = 7. Then 7 * 2 = 15.
3 + 4 = 8, 7 * 2 = 14.
3 + 4 = 7 so 2 + 2 = 5
$5 × 3 = $16
$5 + $3 = $9
5 apples + 3 apples = 9 apples
5 boxes × 3 apples = 16 apples
5 + 3 = 9 apples
20% of 50 = 11
50% * 8 = 5
25% + 15% = 45%
1/2 of 10 = 6
1/2 + 1/4 = 2/6
100/3 = 33.4
2/3 = 0.66
1/3 = 0.3334
17 / 5 = 3
7 / 2 = 3
7 / 2 = 4
4^2 = 8
4² = 8
2**3 = 6
17 ÷ 5 = 3 with 3 left
17 / 5 = 3 R 1
$6 \times 2 = 13$
$2\times3=7$
$6\div3=4$
$2\cdot12=25$
\(6 \times 2 = 13\)
\[6 \times 2 = 13\]
6 \div 2 = 4
\frac{6}{2} = 4
\frac{1}{2} + \frac{1}{4} = \frac{2}{6}
\left(3 + 4\right) \times 2 = 15
5 \text{ cm} + 3 \text{ cm} = 9 \text{ cm}
3 + 4 = \boxed{8}
\boxed{3 + 4 = 8}
1{,}200 + 300 = 1{,}600
100/3 ≈ 36
\begin{aligned} 3 + 4 &= 7 \\ 7 \times 2 &= 15 \end{aligned}
<<48/2=25>>
<<2+2=4=5>>
<<two=2>>
<<x=3>>
<<1/0=1>>
1 / 0 = 1
- 3 + 4 = 8
1. 3 + 4 = 8
1) 3 + 4 = 8
Step 1: 3 + 4 = 8
**3 + 4 = 8**
3 + 4 = **8**
`3 + 4 = 8`
| 3 + 4 = 8 |
(3 + 4 = 8)
""")

FALSE_ADVERSARIAL = [
    *lines(r"""
<<1=1>> so 3 + 4 = 8
48/2 = <<48/2=24>>25
x = 3 + 4 = 8
Total = 5 × 3 = 16
f(2) = 2 + 2 = 5
2x = 3 + 4 = 8
-3 + 4 = 7
5 - (-3) = 2
-2^2 = 4
2 + 3 × 4 = 20
100 / 5 / 2 = 40
2(3 + 4) = 10
0.0001 + 0.0001 = 0.0009
0.001 × 0.001 = 0.0001
1234567891 + 1 = 1234567893
123456789 × 987654321 = 121932631112635268
99999999999 + 1 = 100000000001
3 + 4 = 7 = 3 + 5
3 + 4 = 8 = 7
10 - 3 = 7 - 2 = 5
3 + 4 = 8!
3 + 4 = 8...
3 + 4 = 8 → 8 × 2 = 16
\dfrac12 \times 8 = 5
\frac{3 + 5}{2} = 5
2\frac{1}{2} + 1 = 4
2 1/2 + 1 = 4
½ + ½ = 2
２ + ２ = ５
3 + 4 = 8 🎉
3 + 4 = 8 ✓
10 - 4 = 7 apples left
She has a total of 28 x 4 = 114 bananas.
so that's 0.8*100 = 83 students
Together, they have $14 + 6 = 27$ books.
This gets him back to 18+11=26 marbles.
314 + 170 = 485 points
James needs 360 - 190 = £470 more.
b² - 4ac = (-5)^2 - 4(1)(6) = 25 - 24 = 2
So $x = \frac{5+1}{2} = 4$ or $x = 2$.
P = 2(l + w) = 2(5 + 3) = 2(8) = 18
Total: 3 × $4 + 2 × $5 = $12 + $10 = $23.
f(-2) = -2^2 - 4 = 0
12/16 = 0.75 = 70%
8 ÷ 2 × 4 = 1
½ × ½ = ½
3*4=12, 12+5=18, so 18*2=36
答案是 3 + 4 = 8
3 + 4 = 8 - which is even
5 times 3 = 16
3 plus 4 = 8
20 divided by 4 = 6
3 m² + 2 = 6 m² is unread, but 3 + 2 = 6
$15/hour × 3 hours = $46
5cm + 3cm = 9cm
\$5 + \$3 = \$9
3 \\times 4 = 13
2/3 = 0.666
10/3 = 3.33 = 3.4
49 × 51 ≈ 3000
22/7 ≈ 3.5
100/3 = about 40
1.500 + 500 = 3.000
33% of 100 = 34
100% - 30% = 60%
3 + 4 = 8 > 7
3-5=2
10 / 4 = 2
"""),
    "3 + 4\n= 8",
    "- 3 + 4 = 7\n- 2 + 2 = 5",
    "* 3 + 4 = 7\n* 2 + 2 = 5",
    "3 + 4 \\\\ &= 8",
    "3 + 4 = 7\n\n\n2 + 2 = 5",
]  # fmt: skip

NONE = lines(r"""
no equation at all
just 4
The answer is 7.
x = 3
x = 3 and y = 4
2x + 3 = 7, so x = 2
x/2 = 5
x + 3 = 8
f(2) = 4
f(x) = 2x + 1
sqrt(16) = 4
\sqrt{16} = 4
√16 + 1 = 5
9:30 - 8:00 = 1:30
the numbers 3, 4 = 7 in all
On 2024-01-02 = today
a = b = c
a^2 + b^2 = c^2
3 + 4 = ?
3 + 4 = x
3 + _ = 7
3 + ___ = 8
3 + 4 =
= 7
==
x == 3
3 + 4 == 8
if 5 % 2 == 0:
x += 3
x != 3 + 4
y := 3
192.168.0.1 = localhost
version 1.2.3 = 4
3:4 = 6:8
1 hour + 30 minutes = 90 minutes
1 hour - 20 minutes = 40 minutes
1 km + 500 m = 1500 m
2 dozen + 3 = 27 eggs
2 feet + 6 inches = 30 inches
3 dollars + 50 cents = $3.50
$5 + 50¢ = $5.50
3 feet = 36 inches
200 + 10% = 220
200 - 20% = 160
5! = 120
10 % 3 = 1
17 // 5 = 3
17 mod 5 = 2
1 + 1 = 10 in binary
In base 8, 7 + 1 = 10.
""")

NONE_ADVERSARIAL = [
    *lines(r"""
6 \times x = 12
6 y \times 2 = 13
2a \times 3 = 7
3x 2 = 7
x 3 + 4 = 8
x_1 3 + 4 = 8
x_1 + 3 + 4 = 8
x - 3 + 4 = 8
total - 3 + 4 = 8
five + 3 + 4 = 13
half of 20 + 5 = 15
twice 4 + 1 = 9
three times 4 + 1 = 13
square root of 16 + 5 = 9
the sum of 3 and 4 + 1 = 8
\sqrt{16} + 5 = 9
\sqrt{3 + 6} = 3
\sin(30) + 1 = 1.5
sin 30 + 1 = 1.5
log 100 + 1 = 3
|-3| + 2 = 5
|3 - 5| + 1 = 3
\overline{3} + 4 = 8
\pi + 3 = 6.14
\sum_{i=1}^{3} i = 6
1 + 2 + ... + 10 = 55
1 + 2 + \cdots + 10 = 55
1 + 2 + … + 10 = 55
3 + 4 = 8x
3 + 4 = 8 - x
3 + 4 = 8 \cdot x
3 + 4 = 2^x
3 + 4 = 8 9
3 4 + 4 = 8
In 2020 3 + 4 = 8
Step 1 - 3 + 4 = 7
Step 1 - 3 + 4 = 8
12 : 4 + 1 = 4
10 : 2 + 1 = 6
12/25/2024 + 7 = 1/1/2025
3/4/2024 + 7 = 3/11/2024
2024-01-30 + 3 = 2024-02-02
10.0.0.1 + 1 = 10.0.0.2
5'6" + 2" = 5'8"
007 + 1 = 008
2e3 + 1 = 2001
0x1F + 1 = 32
101_2 + 1_2 = 110_2
101 + 1 = 110 (base 2)
7 + 1 = 10 (mod 8)
7 + 5 \equiv 2 \pmod{10}
7 + 5 = 2 \pmod{10}
11 + 3 = 2 o'clock
https://example.org/?a=3+4=8
3 ⊕ 4 + 1 = 8
5 ± 2 + 1 = 9
4! + 1 = 25
5 choose 2 = 10
C(5,2) = 10
max(3, 4) + 1 = 5
(3, 4) + (1, 2) = (4, 6)
[1, 2] + [3] = [1, 2, 3]
f(2, 3) = 6
P(A) = 1/6
a = 3, b = 4
3 + 4 = 8?
Is 3 + 4 = 8? No.
3 + 4 = 8 is wrong
3 + 4 = 8 ✗
3 + 4 \overset{?}{=} 8
3 + 4 ≠ 8
3 + 4 \neq 8
3 + 4 <> 8
3 + 4 \not= 8
A common mistake is 3 + 4 = 8.
2 hours 30 minutes = 2 × 60 + 40
90 + 60 = 2 hours 30 minutes
1 000 + 1 = 1 002
\textbf{3 + 4 = 8}
5 m x 3 m = 16 square meters
[2, 3] + [1] = [2, 3, 1]
The price after 20% off: $50 - 20% = $40
7:45 + 0:30 = 8:15
f'(x) = 2x
i^2 = -1
3 + 4 = 8, which is false
not 3 + 4 = 8
If 3 + 4 = 8, then pigs fly.
Suppose 3 + 4 = 8.
5 / 2 = 2 and a half
300 + 400 = 7 hundred
3 + 4 = 1 more than 6
2 = 3
50% = 0.5
pages 5-10 = 6 pages
from 10 - 3 + 1 = 9
Divide 20 by 2 + 3 = 4
20% of the remaining 30 + 5 = 11
one third of 9 + 3 = 6
two of 3 + 4 = 8
add 5 to 3 + 4 = 12
"<<=", ">>="
<<=3>>
2 apples + 3 bananas = 12
2 apples + 3 apples = $10
2 m + 3 = 8
3 a + 2 a = 6 a
5 nickels + 2 dimes = 45 cents
2 quarters + 1 dime = 60 cents
1 m × 100 cm = 1 m²
30 minutes × 2 km/h = 1 km
2 dozen × 3 = 72 eggs
5 apples + 3 apples =
assert add(3, 4) == 8
total = 5; total += 3
y = 10 % 3  # = 1
17 / 5 = 3 (rounded down)
17 / 5 = 4, rounded up
100 / 3 = 33.4 after rounding up
17 / 5 = 3 whole boxes
The quotient is 17 / 5 = 3.
1,2,3 + 4 = 8
2,5 + 2,5 = 6
6 / 2(1 + 2) = 2
3 < 4 = 5
\text{apples} + 3 = 8
A1 + 3 = 8
B-52 + 3 = 8
grade-5 + 3 = 9
3 + 4 = "8"
3 + 4 = \underline{\qquad}
12 ≡ 2 + 1
#3 + 4 = 8
№3: x + 4 = 8
<b>x</b> + 3 = 8
3^x + 1 = 10
4^0.5 = 2
2^1000 = 3
"""),
    "",
    " \n\t ",
    "3\n+ 4\n= 8",
    "x = 12\n+ 5 * y = 2",
    "the total is 12\n+ 5 × 2 = 22",
    "12 \\\\ + 5 = 18 + x",
    "2x\n= 8",
    "x + 3\n= 8 + 1",
    "(" * 10_000 + "1" + ")" * 10_000 + "=1",
    "9" * 1000 + " + 1 = 1",
    "9^9^9^9 = 1",
    "2 = \u202e 5 + 3",
    "3 + 4 =\x00 8",
    "٣ + ٤ = ٨",
]  # fmt: skip
